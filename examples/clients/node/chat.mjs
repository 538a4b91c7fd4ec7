// The `openai` package for Node: a whole answer, a stream, a forced tool call, an answer that keeps to a schema.
// Run: npm install openai; OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=.. node chat.mjs
import OpenAI from "openai";

const client = new OpenAI(); // reads both variables
const model = process.env.ERNIE_MODEL ?? "smollm2-135m";
const messages = [{ role: "user", content: "What is the weather in Rome?" }];

const whole = await client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0 });
console.log("whole:", JSON.stringify(whole.choices[0].message.content));

const stream = await client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0, stream: true });
let text = "";
for await (const chunk of stream) text += chunk.choices[0].delta.content ?? "";
console.log("stream:", JSON.stringify(text));

const tool = {
  type: "function",
  function: {
    name: "get_weather",
    strict: true,
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const called = await client.chat.completions.create({
  model,
  messages,
  tools: [tool],
  tool_choice: "required",
  parallel_tool_calls: false,
  max_tokens: 200,
});
const [call] = called.choices[0].message.tool_calls;
console.log("tool:", call.function.name, JSON.parse(call.function.arguments).city);

const schema = { ...tool.function.parameters, properties: { city: { type: "string", enum: ["Paris", "Rome"] } } };
const runner = client.chat.completions.stream({
  model,
  messages,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "place", strict: true, schema } },
});
console.log("schema:", JSON.parse(await runner.finalContent()).city);

try {
  await client.chat.completions.create({ model: "gpt-4o", messages });
} catch (error) {
  console.log("error:", error instanceof OpenAI.NotFoundError, error.code);
}
