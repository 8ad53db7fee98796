// What is sent to the server, and what comes back of it.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "top_k", "repetition_penalty"];

// The body of a request: a field of `settings` that is empty is left to the server.
export function requestBody(model, system, messages, settings) {
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  const body = { model, messages: [...first, ...messages], stream: true };
  for (const name of NUMBERS) {
    const text = String(settings[name] ?? "").trim();
    if (text === "") continue;
    const value = Number(text);
    if (!Number.isFinite(value)) throw new Error(`${name}: ${text} is no number`);
    body[name] = value;
  }
  return body;
}

// The JSON of each server-sent event of a stream of bytes, up to [DONE].
export async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
      const parts = rest.split(/\r\n\r\n|\n\n|\r\r/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
        if (!lines.length) continue;
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What an event of a chat stream says. Raises an Error for an error.
export function piece(event) {
  if (event.error) throw new Error(String(event.error.message ?? "the server failed"));
  const choice = event.choices?.[0] ?? {};
  const delta = choice.delta ?? {};
  return {
    text: String(delta.content ?? ""),
    thought: String(delta.reasoning_content ?? delta.reasoning ?? ""),
    end: choice.finish_reason ?? null,
  };
}

// The words for an answer of the server that is none.
export async function failure(response) {
  const text = await response.text();
  try {
    const told = JSON.parse(text);
    return String(told.error?.message ?? told.message ?? told.detail ?? text);
  } catch {
    return `status ${response.status}: ${text.slice(0, 300)}`;
  }
}
