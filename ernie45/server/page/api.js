// The four requests of the page. Every failure leaves here as an ApiError; an abort stays an AbortError.

import { events } from "./sse.js";

export class ApiError extends Error {
  /** `status` is 0 where no answer arrived; `waitSeconds` is what Retry-After asks for, 0 if it does not. */
  constructor(message, { status = 0, type = null, param = null, code = null, waitSeconds = 0 } = {}) {
    super(message);
    Object.assign(this, { status, type, param, code, waitSeconds });
  }
}

/** `{state, message}`: state is "ready", or what the server calls its state ("loading", "restarting", ..). */
export async function fetchReadiness(key) {
  const response = await request("ready", key);
  if (response.ok) return { state: "ready", message: "" };
  if (response.status !== 503) throw await failure(response);
  const answer = await response.json().catch(() => ({}));
  return { state: String(answer.status ?? "loading"), message: String(answer.message ?? "") };
}

/** `[{id, maxLength, thinks, mayNotThink}]`; maxLength is null where the server does not say. */
export async function fetchModels(key) {
  const response = await request("v1/models", key);
  if (!response.ok) throw await failure(response);
  const { data } = await response.json();
  return data.map((model) => ({
    id: model.id,
    maxLength: model.max_model_len ?? null,
    thinks: model.capabilities?.includes("thinking") ?? false,
    mayNotThink: model.thinking !== "always",
  }));
}

/** Yields the chunks of a streamed chat completion. Throws an ApiError for a refusal and for an error on the way. */
export async function* streamChat(key, body, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { ...chunk.error, status: response.status });
      yield chunk;
    }
  } catch (error) {
    throw error.name === "AbortError" || error instanceof ApiError ? error : new ApiError(error.message);
  }
}

async function request(path, key, options = {}) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { cache: "no-store", credentials: "omit", redirect: "error", ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(error.message);
  }
}

async function failure(response) {
  const { error } = await response.json().catch(() => ({}));
  return new ApiError(error?.message ?? response.statusText, {
    ...error,
    status: response.status,
    waitSeconds: waitSeconds(response.headers.get("Retry-After")),
  });
}

/** Retry-After is a number of seconds or a date. */
function waitSeconds(value) {
  if (!value) return 0;
  const seconds = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Math.max(0, Math.ceil(seconds || 0));
}
