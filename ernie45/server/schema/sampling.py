"""The fields of chat and completions that steer sampling, and what both refuse."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ernie45.engine.params import MAX_LOGPROBS, LoopDetection, SamplingParams
from ernie45.errors import RequestError
from ernie45.processing.constraint import Constraint, asked_constraint
from ernie45.processing.tokenizer import Tokenizer
from ernie45.server.errors import ApiError
from ernie45.server.schema.shared import Length, SharedFields, StopString, StopStrings, TokenId, TopP

_MAX_IDS = 1024
_CONSTRAINT_FIELDS = (
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
)

# Fields that other servers know and this one does not: the values that ask for nothing are accepted, others refused.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "chat_template": (None,),
    "collect_metrics": (None, False),
    "completion_token_ids": (None, []),
    "disable_chat_template": (None, False),
    "disaggregate_info": (None,),
    "documents": (None, []),
    "include_draft_logprobs": (None, False),
    "include_logprobs_decode_token": (None, True),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1, 1.0),
    "logits_processors": (None, []),
    "logits_processors_args": (None, {}),
    "logprob_token_ids": (None, []),
    "media_io_kwargs": (None, {}),
    "mm_hashes": (None, []),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_embeds": (None,),
    "return_tokens_as_token_ids": (None, False),
    "routed_experts": (None, False),
    "service_tier": (None, "auto", "default"),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "structural_tag": (None,),
    "suffix": (None, ""),
    "temp_scaled_logprobs": (None, False),
    "top_p_normalized_logprobs": (None, False),
    "truncate_prompt_tokens": (None,),
    "truncation": (None, "disabled"),
    "truncation_side": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# Known, and of no consequence here: they name the caller or hint at what this server does anyway.
HARMLESS = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id", "trace_context"}
)


class StreamOptions(BaseModel):
    """How a stream reports usage."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    """A last chunk with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""
    include_obfuscation: bool | None = None


class RepetitionDetection(BaseModel):
    """When an answer that repeats itself is ended (`finish_detail` "loop")."""

    model_config = ConfigDict(extra="forbid", strict=True)

    repeats: Annotated[int, Field(ge=2, le=1000)] = LoopDetection.repeats
    max_pattern: Annotated[int, Field(ge=1, le=1024)] = LoopDetection.max_pattern
    min_tokens: Annotated[int, Field(ge=2, le=2**20)] = LoopDetection.min_tokens


class SamplingFields(SharedFields):
    """What chat and completions share beside that."""

    model: str | None = None
    max_tokens: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: TopP | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MAX_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    bad_words: StopStrings | None = None
    bad_words_token_ids: Annotated[list[TokenId], Field(max_length=_MAX_IDS)] | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    repetition_detection: RepetitionDetection | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    max_streaming_response_tokens: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens per chunk at most before it is sent; 1 sends each as it comes."""
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    @property
    def chunk_tokens(self) -> int:
        """Tokens that a chunk of a stream waits for."""
        return self.max_streaming_response_tokens or 1

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def constraint(self) -> Constraint | None:
        """What the text of the answer is forced to. Raises: RequestError."""
        given = {name: getattr(self, name) for name in _CONSTRAINT_FIELDS}
        return asked_constraint(given)

    def stop_reason(self, met: str | int | None) -> str | int | None:
        """What of that which ended an output the caller asked to stop at; the model's own end token is no news."""
        return met if isinstance(met, str) or met in (self.stop_token_ids or ()) else None

    def unknown_fields(self) -> list[str]:
        """Fields that no server is known to have: accepted, and named in a warning header.

        Raises: ApiError for a known field that asks for what is not supported.
        """
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in HARMLESS:
                continue
            if name not in UNSUPPORTED:
                unknown.append(name)
            elif value not in UNSUPPORTED[name]:
                raise ApiError(400, f"{name} is not supported: leave it out", code="unsupported_parameter", param=name)
        return unknown


def sampling_params(
    fields: SamplingFields, defaults: dict[str, Any], tokenizer: Tokenizer, **special: Any
) -> SamplingParams:
    """What the engine is asked for: the request's fields over the model's defaults.

    Args: special: fields of `SamplingParams` that the interface works out itself. Raises: RequestError.
    """
    asked: dict[str, Any] = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": fields.top_k,
        "min_p": fields.min_p,
        "n": fields.n,
        "best_of": fields.best_of,
        "seed": None if fields.seed == -1 else fields.seed,
        "stop": fields.stop,
        "stop_token_ids": fields.stop_token_ids,
        "include_stop_str_in_output": fields.include_stop_str_in_output,
        "ignore_eos": fields.ignore_eos,
        "min_tokens": fields.min_tokens,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "repetition_penalty": fields.repetition_penalty,
        "bad_words": fields.bad_words,
        "bad_words_token_ids": fields.bad_words_token_ids,
        "prompt_logprobs": fields.prompt_logprobs,
    }
    if fields.logit_bias is not None:
        asked["logit_bias"] = {int(token): bias for token, bias in fields.logit_bias.items()}
        _check_known("logit_bias", list(asked["logit_bias"]), tokenizer)
    for name in ("stop_token_ids", "bad_words_token_ids"):
        _check_known(name, asked[name] or [], tokenizer)
    if fields.repetition_detection is not None:
        asked["loop_detection"] = LoopDetection(**fields.repetition_detection.model_dump())
    chosen = {name: value for name, value in {**asked, **special}.items() if value is not None}
    return SamplingParams(**{**defaults, **chosen})


def _check_known(name: str, ids: list[int], tokenizer: Tokenizer) -> None:
    unknown = next((token for token in ids if token >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise RequestError(f"{name} holds id {unknown}, the tokenizer knows 0 to {tokenizer.vocab_size - 1}")


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
