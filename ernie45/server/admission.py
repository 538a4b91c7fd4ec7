"""The way in that all routes share which generate: from a body that has its form to an answer under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from ernie45.server.answering import Answering, Plan
from ernie45.server.answers import caller_of, extra_headers, service_of
from ernie45.server.asgi import request_id
from ernie45.server.schema.sampling import SamplingFields
from ernie45.server.schema.translated import TranslatedFields
from ernie45.server.service import Service

_Body = TypeVar("_Body", bound=SamplingFields | TranslatedFields)


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that the engine has taken."""

    service: Service
    plans: Sequence[Plan]
    answering: Answering
    headers: dict[str, str]
    """For the answer."""

    @property
    def plan(self) -> Plan:
        """The one that there is, where a request makes one."""
        (plan,) = self.plans
        return plan


async def admit(
    request: Request,
    body: _Body,
    make_plans: Callable[[Service, _Body], Sequence[Plan]],
    ignored: Sequence[str] = (),
) -> Admitted:
    """Check what a request asks for, plan it beside the event loop, and hand it to the engine.

    Args: ignored: what of it beside unknown fields has no effect. Raises: ApiError, RequestError, EngineDownError.
    """
    service, caller = service_of(request), caller_of(request)
    service.check_model(body.model)
    unknown = [*ignored, *body.unknown_fields()]
    plans = await service.in_thread(make_plans, service, body)
    service.check_plans(plans)
    answering = await service.answer(plans, caller, request_id(request.scope))
    return Admitted(service=service, plans=plans, answering=answering, headers=extra_headers(request, unknown))
