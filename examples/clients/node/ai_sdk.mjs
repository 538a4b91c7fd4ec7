// The AI SDK (`ai`) through its OpenAI-compatible provider: a stream, a tool, an object.
// Run: npm install ai @ai-sdk/openai-compatible; OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=.. node ai_sdk.mjs
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";

const provider = createOpenAICompatible({
  name: "ernie45",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true, // else the schema is not sent
});
const model = provider(process.env.ERNIE_MODEL ?? "smollm2-135m");
const prompt = "What is the weather in Rome?";
const place = jsonSchema({
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
});

const stream = streamText({ model, prompt, maxOutputTokens: 24, temperature: 0 });
let text = "";
for await (const part of stream.textStream) text += part;
const usage = await stream.usage;
console.log("stream:", JSON.stringify(text), await stream.finishReason, usage.outputTokens);

const weather = tool({ inputSchema: place, execute: async ({ city }) => `Sunny in ${city}` });
const called = await generateText({
  model,
  prompt,
  tools: { weather },
  toolChoice: "required",
  maxOutputTokens: 200,
  providerOptions: { ernie45: { parallel_tool_calls: false } },
});
console.log("tool:", called.toolResults[0].output);

const { object } = await generateObject({ model, prompt, schema: place, maxOutputTokens: 200 });
console.log("object:", object.city);
