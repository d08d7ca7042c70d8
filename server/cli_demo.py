"""What `prefixd demo` shows: one sample of each bundled task, asked of the running server over HTTP.

Called by `server.cli` on the event loop once the server is up.
"""

from __future__ import annotations

import asyncio

import httpx2
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from rich.text import Text

import demo


async def show_samples(url: str, api_key: SecretStr | None) -> bool:
    """Prints prompt and answer of every sample; True if each answer is the one that belongs there.

    All samples are sent at once, so that they decode in one batch.
    """
    samples = demo.load_samples()
    headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
    async with httpx2.AsyncClient(base_url=url, timeout=60.0, headers=headers) as client:
        answers = await asyncio.gather(*(_ask(client, sample) for sample in samples))
    table = Table(title="One base model, one batch, a prefix per task", show_lines=True)
    for heading in ("task", "prompt", "answer", "as trained"):
        table.add_column(heading, overflow="fold")
    came_out = True
    for sample, (answer, fault) in zip(samples, answers, strict=True):
        right = fault is None and answer.strip() == sample.completion.strip()
        came_out &= right
        verdict = "yes" if right else fault or f"no, expected {sample.completion.strip()!r}"
        table.add_row(sample.task, Text(sample.prompt), Text(answer.strip()), Text(verdict))
    Console().print(table)
    return came_out


async def _ask(client: httpx2.AsyncClient, sample: demo.Sample) -> tuple[str, str | None]:
    """The answer, and what went wrong if something did."""
    body = {
        "task": sample.task,
        "prompt": sample.prompt,
        "max_tokens": sample.max_tokens,
        "temperature": 0,
    }
    try:
        response = await client.post("/generate", json=body)
        if response.status_code != httpx2.codes.OK:
            return "", f"{response.status_code}: {response.text}"
        return response.json()["text"], None
    except httpx2.HTTPError as error:
        return "", f"{type(error).__name__}: {error}"
