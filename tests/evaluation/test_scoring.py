"""Scores of a real tiny chat model, held against what it writes and against torch's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from app.errors import MergeyardError
from app.tasks.judging import is_right
from app.tasks.task import Example, Message, Metric, Task
from tests.evaluation.chat import LEARNT, write_chat
from worker.evaluation import scoring
from worker.evaluation.loading import Loaded, loaded
from worker.evaluation.scoring import score

WRONG = (("hi", "hello."), ("2+2", "5"), ("sky", "it is"), ("all", "select a from u"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Loaded]:
    with loaded(folder, "cpu") as opened:
        yield opened


def chat(prompt: str, answer: Any, *, line: int = 1, choices: Sequence[str] = ()) -> Example:
    said = (Message(role="user", content=prompt),)
    return Example(line=line, prompt=None, messages=said, answer=answer, choices=tuple(choices))


def task(metric: Metric, *examples: Example, max_new_tokens: int = 24) -> Task:
    return Task(name="t", metric=metric, examples=examples, max_new_tokens=max_new_tokens)


def written(model: Loaded, prompt: str, most: int = 24) -> str:
    """By transformers, one prompt at a time. None of it is ours."""
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.model.generate(**ids, do_sample=False, max_new_tokens=most)[0, ids["input_ids"].shape[1] :]
    return str(model.tokenizer.decode(answer))


def test_exact_match_is_what_the_model_writes(model: Loaded) -> None:
    asked = [chat(prompt, answer) for prompt, answer in (*LEARNT, *WRONG)]
    exact = [written(model, example.messages[0].content) == f"{example.answer}<end>" for example in asked]
    assert exact == [True] * len(LEARNT) + [False] * len(WRONG), "else this test shows nothing"
    found = score(model, task("exact_match", *asked))
    share = len(LEARNT) / len(asked)
    assert (found.score, found.examples) == (share, len(asked))
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (len(asked) - 1)))
    for example, right in zip(asked, exact, strict=True):
        assert score(model, task("exact_match", example)).score == right


@pytest.mark.parametrize(
    ("metric", "answers"),
    [
        ("contains", ["ell", "4", "ann", "from", "red"]),
        ("regex", ["^h.*o$", r"\d$", "x", "^select", "blue"]),
        ("json", [{"a": 1}, {"name": "ann"}, {"name": "ann"}, {"name": "ann"}, {}]),
        ("sql", ["select a from t", "select 4", "select a", "SELECT A FROM t;", "select blue"]),
    ],
)
def test_what_is_judged_as_a_text_is_what_the_model_writes_by_itself(
    model: Loaded, metric: Metric, answers: Sequence[Any]
) -> None:
    asked = [chat(prompt, answer) for (prompt, _), answer in zip(LEARNT, answers, strict=True)]
    texts = [written(model, prompt).removesuffix("<end>") for prompt, _ in LEARNT]
    assert texts == [answer for _, answer in LEARNT]
    right = [is_right(text, example, metric) for text, example in zip(texts, asked, strict=True)]
    assert 0 < sum(right) < len(right)
    assert score(model, task(metric, *asked)).score == sum(right) / len(right)


def test_an_answer_that_is_cut_is_judged_as_far_as_it_goes(model: Loaded) -> None:
    assert score(model, task("contains", chat("sky", "it is"), max_new_tokens=5)).score == 1
    assert score(model, task("contains", chat("sky", "blue"), max_new_tokens=5)).score == 0


def prompt_ids(model: Loaded, prompt: str) -> list[int]:
    return list(model.tokenizer(f"<user>{prompt}<end><assistant>", add_special_tokens=False)["input_ids"])


def losses(model: Loaded, prompt: str, answer: str) -> torch.Tensor:
    """Of each token of the answer, in nats: one example at a time, all logits, torch's cross entropy."""
    shown = prompt_ids(model, prompt)
    ids = torch.tensor([shown + model.tokenizer(answer, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        logits = model.model(input_ids=ids).logits[0, len(shown) - 1 : -1]
    return cross_entropy(logits.double(), ids[0, len(shown) :], reduction="none")


def test_nll_is_the_loss_per_token_of_the_answers(model: Loaded) -> None:
    pairs = (*LEARNT, *WRONG)
    each = [losses(model, prompt, answer) for prompt, answer in pairs]
    found = score(model, task("nll", *(chat(prompt, answer) for prompt, answer in pairs)))
    mean = torch.cat(each).mean().item()
    assert found.score == pytest.approx(mean, rel=1e-4) and 0.1 < mean < 10
    totals = torch.tensor([[loss.sum().item(), len(loss)] for loss in each], dtype=torch.float64)
    linear = totals[:, 0] - mean * totals[:, 1]
    error = (linear.std(correction=1) * math.sqrt(len(pairs)) / totals[:, 1].sum()).item()
    # the deviations of a ratio sum to zero, so their spread about 0 is that about their mean
    assert found.standard_error == pytest.approx(error, rel=1e-3)


def test_of_choices_the_likeliest_is_taken(model: Loaded) -> None:
    choices = ["hello", "4", "it is blue."]
    right = [chat(prompt, choices.index(answer), choices=choices) for prompt, answer in LEARNT if answer in choices]
    wrong = chat("hi", 1, choices=choices)
    assert len(right) == 3
    assert score(model, task("multiple_choice", *right, wrong)).score == 0.75


def test_a_text_prompt_is_gone_on_with_as_it_is(model: Loaded) -> None:
    as_text = Example(line=1, prompt="<user>hi<end><assistant>", messages=(), answer="hello")
    assert score(model, task("exact_match", as_text)).score == 1
    assert score(model, task("nll", as_text)).score == score(model, task("nll", chat("hi", "hello"))).score


@pytest.mark.parametrize("metric", ["exact_match", "nll", "contains"])
def test_how_it_is_batched_changes_nothing(model: Loaded, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = task(metric, *(chat(prompt, answer) for prompt, answer in (*LEARNT, *WRONG)))
    together = score(model, asked)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 40)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 1)
    monkeypatch.setattr(scoring, "ROWS", 2)
    alone = score(model, asked, on_progress=lambda done, total: told.append((done, total)))
    assert alone.score == pytest.approx(together.score, rel=1e-5)
    assert len(told) > 4 and told[-1] == (len(asked.examples), len(asked.examples))
    assert score(model, asked) == alone, "the same twice"


def test_it_can_be_stopped_between_batches(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "ROWS", 1)
    checks = iter([None, None, KeyboardInterrupt()])

    def check() -> None:
        if (error := next(checks)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        score(model, task("contains", *(chat(prompt, answer) for prompt, answer in LEARNT)), check=check)
    assert list(checks) == []


def test_what_the_model_cannot_look_at_is_told_with_its_line(model: Loaded) -> None:
    asked = [chat("hi", "hello"), chat("a" * 60, "hello", line=7)]
    with pytest.raises(MergeyardError, match=r"Line 7 of the task t takes 68 tokens .* looks at 64") as refused:
        score(model, task("nll", *asked))
    assert refused.value.code == "task_too_long"
    with pytest.raises(MergeyardError, match="lower max_new_tokens"):
        score(model, task("contains", chat("hi", "hello"), max_new_tokens=64))


class TestLoading:
    def test_messages_need_a_template(self, tmp_path: Path) -> None:
        folder = write_chat(tmp_path / "model", learnt=LEARNT[:1], template=False)
        with loaded(folder, "cpu") as opened:
            assert score(opened, task("nll", Example(line=1, prompt="hi", messages=(), answer="o"))).score > 0
            with pytest.raises(MergeyardError) as refused:
                score(opened, task("nll", chat("hi", "hello")))
        assert refused.value.code == "chat_template_missing"

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"config.json": '{"model_type": "nobody-knows"}'}, "not_supported"),
            ({"config.json": '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'}, "not_supported"),
            ({"tokenizer.json": "{}"}, "tokenizer_invalid"),
        ],
    )
    def test_what_cannot_be_loaded_is_an_error_with_a_code(
        self, folder: Path, tmp_path: Path, change: dict[str, str], code: str
    ) -> None:
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        for name, text in change.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(MergeyardError) as refused, loaded(tmp_path, "cpu"):
            pass
        assert refused.value.code == code and "Traceback" not in refused.value.message

    def test_code_and_pickles_of_a_model_are_never_run(self, folder: Path, tmp_path: Path) -> None:
        import json

        (tmp_path / "model").mkdir()
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
        config["model_type"] = "evil"
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        ran = tmp_path / "ran"
        (tmp_path / "model" / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
        torch.save({"a": torch.zeros(1)}, tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(MergeyardError), loaded(tmp_path / "model", "cpu"):
            pass
        assert not ran.exists()
