"""Bodies of requests and answers, as pydantic models: what the OpenAPI document shows is what is checked."""
