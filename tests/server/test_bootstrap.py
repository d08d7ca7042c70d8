"""What `bootstrap` decides by itself: which bundled prefixes are published, and what is refused early."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

import demo
from prefix_store import PrefixStore
from prefix_store.errors import UnknownTask
from server.bootstrap import build_engine, publish_demo_prefixes
from server.config import ServeConfig
from server.errors import ConfigError
from server.metrics import Metrics
from server.model.base_spec import base_spec
from server.model.loader import load_model
from server.model.merged_linear import MergedPart
from server.model.prepacked_linear import PrepackedLinear
from server.types import GenerationRequest, RequestOutput, SamplingParams


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    model = load_model(demo.MODEL_DIR, device=torch.device("cpu"), dtype="float32")
    opened = PrefixStore.open(tmp_path / "store", base_spec(model), host_cache_bytes=0)
    publish_demo_prefixes(opened, opened.base)
    return opened


def test_bundled_prefixes_are_published_once(store: PrefixStore) -> None:
    publish_demo_prefixes(store, store.base)

    assert {info.name: len(info.versions) for info in store.tasks()} == {
        path.stem: 1 for path in demo.PREFIXES_DIR.glob("*.safetensors")
    }


def test_a_bundled_task_that_a_user_replaced_or_deleted_stays_so(store: PrefixStore) -> None:
    theirs = store.put("sentiment", (demo.PREFIXES_DIR / "record-qa.safetensors").read_bytes())
    store.delete("record-qa")

    publish_demo_prefixes(store, store.base)

    assert store.resolve("sentiment").digest == theirs.version.digest
    with pytest.raises(UnknownTask):
        store.resolve("record-qa")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pin": ("nobody",)}, "--pin nobody"),
        ({"attention": "wishful"}, "wishful"),
        ({"max_num_seqs": 1024}, "max_num_batched_tokens"),
    ],
)
def test_a_setting_that_can_not_work_is_refused_by_name(
    settings: dict[str, object], named: str, tmp_path: Path
) -> None:
    config = ServeConfig(store=tmp_path / "store", device="cpu", **settings)

    with pytest.raises(ConfigError, match=named):
        build_engine(config, Metrics())


def test_a_chat_template_of_the_operators_takes_the_place_of_the_models(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    config = ServeConfig(store=tmp_path / "store", device="cpu", chat_template=template)

    serving = build_engine(config, Metrics())

    turns = [{"role": "user", "content": "hello"}]
    assert serving.tokenizer.decode(serving.tokenizer.encode_chat(turns)).strip() == "<hello>"
    serving.store.close()


@pytest.mark.parametrize("text", [None, "", "{% for %}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_writes_no_conversation_is_refused_at_start(
    text: str | None, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    if text is not None:
        template.write_text(text)
    config = ServeConfig(store=tmp_path / "store", device="cpu", chat_template=template)

    with pytest.raises(ConfigError, match="--chat-template"):
        build_engine(config, Metrics())


def test_a_cpu_serves_merged_and_prepacked_weights_under_the_fingerprint_of_the_plain_ones(
    tmp_path: Path,
) -> None:
    plain = load_model(demo.MODEL_DIR, device=torch.device("cpu"), dtype="float32")

    serving = build_engine(ServeConfig(store=tmp_path / "store", device="cpu"), Metrics())

    kinds = {type(m) for m in serving.model.module.modules()}
    assert {MergedPart, PrepackedLinear} <= kinds
    assert serving.base.fingerprint == base_spec(plain).fingerprint
    assert serving.model.weight_bytes == plain.weight_bytes


@pytest.mark.parametrize(("prompt_cache", "expected"), [(True, 48), (False, 0)])
def test_the_prompt_cache_is_on_unless_it_is_switched_off(
    prompt_cache: bool, expected: int, tmp_path: Path
) -> None:
    config = ServeConfig(store=tmp_path / "store", device="cpu", prompt_cache=prompt_cache)
    engine = build_engine(config, Metrics()).engine
    sampling = SamplingParams(max_tokens=1, temperature=0.0)

    async def answer(name: str) -> RequestOutput:
        stream = engine.submit(GenerationRequest(name, tuple(range(10, 60)), sampling))
        [output] = [output async for output in stream]
        return output

    async def scenario() -> tuple[RequestOutput, RequestOutput]:
        await engine.start()
        try:
            return await answer("first"), await answer("second")
        finally:
            await engine.stop()

    first, second = asyncio.run(scenario())

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, expected)
    assert first.token_ids == second.token_ids
