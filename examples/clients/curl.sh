#!/bin/sh
# One chat completion with curl.
# Run: OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=.. sh examples/clients/curl.sh
set -eu

curl --silent --show-error --fail-with-body "$OPENAI_BASE_URL/chat/completions" \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer $OPENAI_API_KEY" \
  -d @- << 'EOF'
{
  "model": "smollm2-135m",
  "messages": [
    {"role": "system", "content": "Be a helpful assistant"},
    {"role": "user", "content": "Hi there!"}
  ],
  "response_format": {"type": "text"},
  "max_tokens": 64
}
EOF
