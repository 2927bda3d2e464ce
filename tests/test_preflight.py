"""Start-up checks: each problem with its key, all at once, and nothing that passes by accident."""

import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from megadistill.config import ConfigError, RunConfig
from megadistill.config.distillation import BranchConfig
from megadistill.config.schema import ChecksConfig
from megadistill.convert.families import read_spec
from megadistill.data.pools import PromptPool
from megadistill.data.tokenizer_files import read_vocabulary
from megadistill.preflight import machine_problems
from megadistill.rundir import RunDir
from megadistill.startup import (
    check_equal_start,
    check_first_batch,
    check_pools,
    check_vocabularies,
    common_tokenizer,
    describe_run,
)
from megadistill.types import FloatArray, ScoreRequest, TokenScores, TokenSpan, TopK
from tests.tiny import (
    Tree,
    camopd_tree,
    float32,
    make_bpe_tokenizer,
    make_config,
    make_prompt,
    make_tokenizer,
    write_model,
    write_model_config,
)


def tree_on(folder: Path, **changes: Tree | str) -> Tree:
    """A run on two models in `folder`, whose student starts as its domain teacher."""
    teachers = {name: {"path": str(folder / name)} for name in ("general", "domain")}
    return camopd_tree(student=teachers["domain"], teachers=teachers) | changes


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with two small models."""
    for name in ("general", "domain"):
        write_model(tmp_path / name)
    return tmp_path


def problems(tree: Tree) -> list[str]:
    return machine_problems(make_config(tree))


def test_a_run_that_can_be_started_passes(models: Path) -> None:
    assert not problems(tree_on(models))


def test_a_model_has_no_more_probable_ids_than_ids(models: Path) -> None:
    size = read_spec(models / "domain").vocab_size
    branches = {
        "general": {"pool": "general", "teacher": "general"},
        "domain": {"pool": "medical", "teacher": "domain"},
    }
    for part, kind in (("loss", "top_k"), ("tokens", "accepted")):
        for asked in (size, size + 1):
            settings = {part: {"kind": kind, "size": asked}}
            tree = tree_on(models, algorithm={"kind": "mopd", "branches": branches} | settings)
            expected = f"algorithm.{part}.size: found {size + 1}, expected at most {size}, the ids"
            assert [line.startswith(expected) for line in problems(tree)] == [True] * (asked > size)


def test_engines_that_sleep_cannot_sample_ahead(models: Path) -> None:
    rollout: Tree = {"placement": "colocated", "max_staleness": 1, "max_tokens": 16}
    assert problems(tree_on(models, rollout=rollout)) == [
        "rollout.max_staleness: found 1, expected 0 with rollout.placement colocated"
    ]


def test_a_model_that_is_not_in_the_cache_of_the_hub_is_named(models: Path) -> None:
    (line,) = problems(tree_on(models, student={"path": "no-such-org/no-such-model"}))
    assert line.startswith("student.path: found 'no-such-org/no-such-model', which is neither")
    assert "nor in the Hugging Face cache; run `hf download no-such-org/no-such-model`" in line


def test_a_model_in_the_cache_of_the_hub_is_checked(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "hub"))
    folder = models / "hub" / "models--Qwen--Qwen3-8B"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(models / "domain", folder / "snapshots" / ("a" * 40))
    assert not problems(tree_on(models, student={"path": "Qwen/Qwen3-8B"}))
    lines = problems(tree_on(models, student={"path": "Qwen/Qwen3-8B"}, parallel={"pp": 3}))
    assert lines[0] == "parallel.pp: found 3, expected a divisor of the 4 layers of student"


def test_files_of_prompts_that_do_not_exist_are_named(models: Path) -> None:
    tree = tree_on(models)
    pools = tree["data"]["pools"]
    (models / "here.jsonl").touch()
    files = [{"kind": "file", "path": str(models / f"{name}.jsonl")} for name in ("here", "gone")]
    pools["general"] = {"sources": [{"kind": "packaged", "name": "general"}, *files]}
    pools["unused"] = {"sources": [{"kind": "file", "path": "./nowhere.jsonl"}]}
    (line,) = problems(tree)
    assert line.startswith(f"data.pools.general.sources[2].path: found '{models}/gone.jsonl'")
    assert "megadistill prepare" in line


def test_data_sets_that_are_not_here_are_named(models: Path) -> None:
    tree = tree_on(models)
    (models / "here.txt").touch()
    sources = [{"kind": "dataset", "path": path} for path in ("org/name", str(models), "./gone")]
    sources.append({"kind": "file", "path": str(models / "here.txt")})
    tree["data"]["pools"]["general"] = {"sources": sources}
    absent, invalid, unreadable = problems(tree)
    assert absent.startswith("data.pools.general.sources[0].path: found 'org/name', which is")
    assert "hf download --repo-type dataset org/name" in absent
    assert invalid.startswith("data.pools.general.sources[2].path: found './gone', which does not")
    assert unreadable.startswith("data.pools.general.sources[3].path: found")
    assert "expected one of .jsonl, .json, .parquet, .csv" in unreadable


@pytest.mark.parametrize("path", ["cache:gone", "/nowhere/model", "~/gone", "a/b/c", "gone"])
def test_a_model_that_does_not_exist_is_named(models: Path, path: str) -> None:
    (line,) = problems(tree_on(models, student={"path": path}))
    assert line.startswith("student.path: found")
    assert line.endswith("which does not exist")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.safetensors", None, "only safetensors weights are read"),
        ("model.safetensors", POINTER, "found a Git LFS pointer, expected weights"),
        ("model.safetensors", "cut", "found no whole safetensors file"),
        ("tokenizer.json", None, "found no tokenizer.json, expected the files of a tokenizer"),
        ("tokenizer.json", POINTER, "found a Git LFS pointer, expected JSON"),
        ("tokenizer.json", '{"model": {', "tokenizer.json: not valid JSON: .*; download it again"),
        ("tokenizer.json", "{}", "tokenizer.json: found no vocabulary, expected tokens with ids"),
        ("tokenizer.json", "[1]", r"tokenizer.json: found '\[1\]', expected a JSON object"),
        ("chat_template.jinja", None, "has no chat template"),
        ("chat_template.jinja", " \n", "has no chat template"),
        ("chat_template.jinja", "{% for m in %}", "its chat template is none: Expected an expr"),
        ("tokenizer_config.json", None, "found no eos_token_id in config.json or generation_c"),
        ("config.json", "[]", r"config.json: found '\[\]', expected a JSON object of settings"),
        ("config.json", None, "no such file, expected a Hugging Face model directory"),
    ],
)
def test_what_the_roles_would_refuse_of_a_model_is_refused_before(
    models: Path, name: str, content: str | None, expected: str
) -> None:
    file = models / "domain" / name
    file.unlink()
    (models / "domain" / "pytorch_model.bin").touch()
    if content is not None:
        file.write_text(content)
    (line, *more) = problems(tree_on(models))
    assert re.search(rf"^student\.path: .*{expected}", line)
    # The domain teacher is the same model, but nobody chats with it.
    assert len(more) == (name not in ("chat_template.jinja", "tokenizer_config.json"))


def test_chat_templates_of_older_and_of_training_files_are_templates(models: Path) -> None:
    folder = models / "domain"
    (folder / "chat_template.jinja").write_text("{% generation %}a{% endgeneration %}")
    assert not problems(tree_on(models))
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "{% for m in messages %}{% break %}{% endfor %}"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "eos_token": "<|end|>"})
    )
    assert not problems(tree_on(models))
    named[0]["template"] = "{% break"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "eos_token": "<|end|>"})
    )
    (line,) = problems(tree_on(models))
    assert "its chat template is none" in line


def test_tokenizers_are_compared_before_anything_is_loaded(models: Path) -> None:
    make_tokenizer(["a b"]).save_pretrained(models / "general")
    (line,) = problems(tree_on(models))
    assert line == (
        "teachers.general.path: 1 tokens have another id than in the student's tokenizer "
        "(0 allowed), e.g. 'c' (7, unknown)"
    )
    make_tokenizer(["a c b d"]).save_pretrained(models / "general")
    assert problems(tree_on(models)) == []
    write_model_config(models / "general", vocab_size=8)
    assert "teachers.general.path: " in problems(tree_on(models))[0]
    assert "1 ids beyond the 8 rows of the embedding" in problems(tree_on(models))[0]


def test_a_vocabulary_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    for tokenizer in (make_tokenizer(["a b c"]), make_bpe_tokenizer(["<|im_end|>"]), unigram()):
        tokenizer.save_pretrained(tmp_path)
        assert read_vocabulary(tmp_path) == tokenizer.get_vocab()


def unigram() -> PreTrainedTokenizerFast:
    model = Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(model), eos_token="</s>"
    )


def test_a_data_file_that_is_only_a_pointer_is_named(models: Path) -> None:
    rows = models / "rows.jsonl"
    rows.write_text(POINTER)
    pool = {"sources": [{"kind": "file", "path": str(rows)}]}
    tree = tree_on(models)
    tree["data"]["pools"]["general"] = pool
    (line,) = problems(tree)
    assert line.startswith(f"{rows}: found a Git LFS pointer, expected data; run `git lfs pull`")


def test_a_model_of_an_unknown_family_is_named(models: Path) -> None:
    write_model_config(models / "general", model_type="mamba")
    (line,) = problems(tree_on(models))
    assert line.startswith("teachers.general.path:")
    assert "found 'mamba'" in line


def test_a_directory_without_a_model_is_named(models: Path) -> None:
    (models / "general" / "config.json").unlink()
    (line,) = problems(tree_on(models))
    assert line.startswith("teachers.general.path:")
    assert "no such file" in line


def test_parallel_sizes_must_divide_the_model(models: Path) -> None:
    write_model_config(models / "general", num_key_value_heads=1, num_attention_heads=3)
    lines = problems(tree_on(models, parallel={"tp": 2, "pp": 3}))
    assert lines == [
        "parallel.pp: found 3, expected a divisor of the 4 layers of student",
        "parallel.tp: found 2, expected a divisor of the 3 attention heads of teachers.general",
        "parallel.tp: found 2, expected a divisor of the 1 key/value heads of teachers.general",
        "parallel.pp: found 3, expected a divisor of the 4 layers of teachers.general",
        "parallel.pp: found 3, expected a divisor of the 4 layers of teachers.domain",
    ]


def test_feed_forward_units_must_be_divisible(models: Path) -> None:
    for name in ("general", "domain"):
        write_model_config(
            models / name, num_key_value_heads=3, num_attention_heads=3, num_hidden_layers=3
        )
    lines = problems(tree_on(models, parallel={"tp": 3}))
    assert {line.split("the ")[1] for line in lines} == {
        "64 feed-forward units of student",
        "64 feed-forward units of teachers.general",
        "64 feed-forward units of teachers.domain",
    }


def test_prompts_and_responses_must_fit_the_models(models: Path) -> None:
    write_model_config(models / "general", max_position_embeddings=79)
    (line,) = problems(tree_on(models))  # 64 prompt tokens and 16 of response
    assert line.startswith("teachers.general: its context is 79 tokens, expected at least 80")
    write_model_config(models / "general", max_position_embeddings=80)
    assert not problems(tree_on(models))


def test_prompts_and_responses_must_fit_the_engines(models: Path) -> None:
    (line,) = problems(tree_on(models, rollout={"max_tokens": 16, "max_model_len": 79}))
    assert line == "rollout.max_model_len: found 79, expected at least 80"
    assert not problems(tree_on(models, rollout={"max_tokens": 16, "max_model_len": 80}))


def test_heldout_divergences_need_vocabularies_of_one_size(models: Path) -> None:
    write_model_config(models / "general", vocab_size=101)
    assert not problems(tree_on(models))  # gaps on sampled tokens do not need them
    heldout = {name: {"pool": "general", "teacher": name} for name in ("general", "domain")}
    (line,) = problems(tree_on(models, evaluate={"heldout": heldout}))
    assert line.startswith(
        "evaluate.heldout.general.teacher: teachers.general has vocab_size 101 (100), expected"
    )


def test_heldout_teachers_must_have_the_shape_of_the_students_engines(models: Path) -> None:
    write_model_config(models / "general", num_hidden_layers=6, max_position_embeddings=512)
    assert not problems(tree_on(models))
    heldout = {"general": {"pool": "general", "teacher": "general"}}
    (line,) = problems(tree_on(models, evaluate={"heldout": heldout}))
    assert "teachers.general has num_layers 6 (4), expected" in line


def free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(
        "megadistill.preflight.shutil.disk_usage", lambda _: SimpleNamespace(free=free)
    )


def test_disk_space_must_be_free_for_the_checkpoints_of_this_model(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """43,552 parameters: 3 checkpoints of 14 bytes each and 4 copies of 2, 2.2 MB."""
    spec = read_spec(models / "domain")
    assert spec.num_parameters == 43_552
    tree = tree_on(models, runs_dir=str(models / "not" / "yet"))
    needed = 43_552 * (3 * 14 + 4 * 2)
    free_space(monkeypatch, needed)
    assert not problems(tree)
    free_space(monkeypatch, needed - 1)
    (line,) = problems(tree)
    assert line.startswith(f"runs_dir: 0.0 GiB are free at {models}, expected 0.0 for")


def test_what_a_run_has_on_disk_already_is_not_asked_for_again(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_on(models, runs_dir=str(models))
    checkpoint = models / "tiny" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(10**6))
    free_space(monkeypatch, 43_552 * (3 * 14 + 4 * 2) - 10**6)
    assert not problems(tree)


def test_all_problems_are_reported_at_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 0)
    write_model_config(models / "domain", num_hidden_layers=6)
    tree = tree_on(models, parallel={"pp": 4})
    tree["teachers"]["general"] = {"path": "cache:gone"}
    tree |= {"rollout": {"max_model_len": 10, "max_tokens": 16}}
    keys = [line.split(":")[0] for line in problems(tree)]
    assert keys == [
        "teachers.general.path",
        "parallel.pp",
        "parallel.pp",
        "rollout.max_model_len",
        "runs_dir",
    ]


def save_tokenizers(folder: Path, **texts: str) -> RunConfig:
    for name, text in texts.items():
        make_tokenizer([text]).save_pretrained(folder / name)
    return make_config(tree_on(folder))


def test_models_with_one_tokenizer_pass(models: Path) -> None:
    config = save_tokenizers(models, general="a b c", domain="a b c")
    assert common_tokenizer(config).encode("b") == [6]


def test_a_teacher_that_reads_ids_otherwise_is_refused(models: Path) -> None:
    """As many tokens, the same words but one: only the ids tell."""
    config = save_tokenizers(models, general="a b x", domain="a b c")
    with pytest.raises(
        ConfigError, match=r"teachers\.general\.path: 1 tokens .* 'c' \(7, unknown\)"
    ):
        common_tokenizer(config)


def test_a_teacher_with_the_same_words_in_another_order_is_refused(models: Path) -> None:
    config = save_tokenizers(models, general="a b c", domain="a b c")
    tokenizer = make_tokenizer(["a b c"])
    text = tokenizer.backend_tokenizer.to_str()
    swapped = text.replace('"a":5,"b":6', '"a":6,"b":5')
    assert swapped != text
    (models / "general" / "tokenizer.json").write_text(swapped)
    with pytest.raises(ConfigError, match=r"path: 2 tokens .* 'a' \(5, 6\), 'b' \(6, 5\)"):
        common_tokenizer(config)


def test_a_student_without_a_chat_template_is_refused(models: Path) -> None:
    config = save_tokenizers(models, general="a", domain="a")
    for file in (models / "domain").glob("*chat_template*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"student\.path: .* has no chat template"):
        common_tokenizer(config)


def test_a_student_without_an_end_token_is_refused(models: Path) -> None:
    config = save_tokenizers(models, general="a", domain="a")
    tokenizer = make_tokenizer(["a"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(models / "domain")
    with pytest.raises(ValueError, match="no end token"):
        common_tokenizer(config)


def test_a_template_that_ends_turns_otherwise_than_the_tokenizer_is_told(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = save_tokenizers(models, general="a", domain="a")
    common_tokenizer(config)
    assert not caplog.text
    tokenizer = make_tokenizer(["a"])
    tokenizer.eos_token = "<|system|>"  # as a base model's <|endoftext|>
    for name in ("general", "domain"):
        tokenizer.save_pretrained(models / name)
    common_tokenizer(config)
    assert "ends a turn with '<|end|>', the tokenizer's end token is '<|system|>'" in caplog.text


def test_a_teacher_that_ends_its_turns_otherwise_is_refused(models: Path) -> None:
    """The same words with the same ids, but what they are for differs."""
    config = save_tokenizers(models, general="a b", domain="a b")
    other = make_tokenizer(["a b"])
    other.eos_token = "<|system|>"
    other.save_pretrained(models / "general")
    with pytest.raises(ConfigError, match=r"teachers\.general\.path: .* eos_token_id is 2"):
        common_tokenizer(config)


@pytest.mark.parametrize("kind", ["bos_token", "pad_token"])
def test_a_teacher_that_pads_otherwise_is_told(
    models: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = save_tokenizers(models, general="a b", domain="a b")
    other = make_tokenizer(["a b"])
    setattr(other, kind, "<|system|>")
    other.save_pretrained(models / "general")
    common_tokenizer(config)
    assert f"teachers.general: its {kind} is '<|system|>', the student's None" in caplog.text


def with_added(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(["a b"])
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize(("whose", "folder"), [("student", "domain"), ("teacher", "general")])
def test_an_added_token_that_no_prompt_holds_is_told(
    models: Path, whose: str, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = save_tokenizers(models, general="a b", domain="a b")
    with_added("<|call|>").save_pretrained(models / folder)
    common_tokenizer(config)
    assert f"teachers.general: only the {whose} knows <|call|>" in caplog.text


def test_an_added_token_of_the_template_must_be_known_to_the_teacher(models: Path) -> None:
    config = save_tokenizers(models, general="a b", domain="a b")
    student = with_added("<|call|>")
    student.chat_template = str(student.chat_template) + "{{ '<|call|>' }}"
    student.save_pretrained(models / "domain")
    with pytest.raises(ConfigError, match=r"1 tokens .* '<\|call\|>' \(7, unknown\)"):
        common_tokenizer(config)


def vocabulary_check(models: Path, logprobs_V: Sequence[float]) -> None:
    """Run the check with models of three ids and a padding row, whose log-probs these are."""
    for name in ("general", "domain"):
        write_model_config(models / name, vocab_size=3)

    def read(_model: str, spans: Sequence[TokenSpan], request: ScoreRequest) -> list[TokenScores]:
        order = np.argsort(-np.asarray(logprobs_V))[None, : request.top_k]
        top = TopK(ids_RK=order.astype(np.int32), logprobs_RK=float32(logprobs_V)[order])
        return [TokenScores(logprobs_R=top.logprobs_RK[:, 0], top_k=top)]

    check_vocabularies(make_config(tree_on(models)), make_pools(), read)


def test_probabilities_over_all_ids_that_add_up_to_one_pass(models: Path) -> None:
    vocabulary_check(models, np.log([0.5, 0.3, 0.2, 1e-30]).tolist())


@pytest.mark.parametrize("padding", [0.1, 0.25])  # the least, and not the least likely
def test_padding_that_takes_probability_is_refused(models: Path, padding: float) -> None:
    share = 1 - padding
    with pytest.raises(RuntimeError, match=r"student: .* padding takes part"):
        vocabulary_check(models, np.log([0.5 * share, 0.3 * share, 0.2 * share, padding]).tolist())


def make_pools(num_heldout: int = 3) -> dict[str, PromptPool]:
    prompts = [make_prompt(f"m{index}", pool="medical") for index in range(6)]
    return {
        "medical": PromptPool(
            name="medical",
            train=prompts[num_heldout:],
            heldout=prompts[:num_heldout],
            num_dropped=1,
            seed=0,
        )
    }


DOMAIN = BranchConfig(pool="medical", teacher="domain")


def equal_start(config: RunConfig, differences: Sequence[float]) -> list[str]:
    """Run the check with a teacher that differs by so much on each span; the models asked."""
    Path(config.teachers["domain"].path).mkdir(exist_ok=True)
    asked: list[str] = []

    def score(model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        asked.append(model)
        extra = differences if model == "domain" else [0.0] * len(spans)
        return [
            np.full(span.num_scored, -1.0 + more, dtype=np.float32)
            for span, more in zip(spans, extra, strict=True)
        ]

    check_equal_start(config, DOMAIN, make_pools(), score)
    return asked


def test_equal_scores_of_an_equal_start_pass(tmp_path: Path) -> None:
    assert equal_start(make_config(tree_on(tmp_path)), [0.0, 0.0]) == ["student", "domain"]


@pytest.mark.parametrize("differences", [[0.0, 1e-6], [-1e-6, 0.0], [0.0, math.nan]])
def test_any_difference_of_an_equal_start_is_refused(
    tmp_path: Path, differences: list[float]
) -> None:
    with pytest.raises(RuntimeError, match=r"differ by up to .* \(0 allowed\)"):
        equal_start(make_config(tree_on(tmp_path)), differences)


def test_a_student_that_starts_elsewhere_may_differ(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    config = make_config(tree_on(tmp_path, student={"path": str(tmp_path / "other")}))
    assert equal_start(config, [0.5, 0.5]) == []


def test_one_directory_under_two_names_is_an_equal_start(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("domain")
    for path in (tmp_path / "link", tmp_path / "general" / ".." / "domain"):
        (tmp_path / "general").mkdir(exist_ok=True)
        config = make_config(tree_on(tmp_path, student={"path": str(path)}))
        with pytest.raises(RuntimeError, match="differ by up to"):
            equal_start(config, [0.0, 1e-3])


def test_models_of_two_precisions_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = tree_on(tmp_path)
    tree["teachers"]["domain"] = tree["teachers"]["domain"] | {"precision": "fp8_current"}
    with caplog.at_level(logging.INFO):
        assert equal_start(make_config(tree), [0.5, 0.5]) == []
    assert "not checked, student in bf16 and teacher in fp8_current" in caplog.text


LIMITS = ChecksConfig(max_mean_log_ratio=0.02, max_masked_fraction=0.005)
GOOD = {"general/log_ratio_absolute": 0.02, "general/masked_fraction": 0.005, "loss": 99.0}


def test_a_first_batch_within_the_limits_passes() -> None:
    check_first_batch(GOOD, LIMITS)


@pytest.mark.parametrize(
    ("quantity", "key"),
    [
        ("log_ratio_absolute", "max_mean_log_ratio"),
        ("masked_fraction", "max_masked_fraction"),
    ],
)
@pytest.mark.parametrize("value", [0.021, math.nan, math.inf])
def test_a_first_batch_beyond_a_limit_is_refused(quantity: str, key: str, value: float) -> None:
    with pytest.raises(RuntimeError, match=rf"branch 'general': {quantity} is .* checks\.{key}"):
        check_first_batch(GOOD | {f"general/{quantity}": value}, LIMITS)


def test_every_branch_of_a_first_batch_is_looked_at() -> None:
    with pytest.raises(RuntimeError, match="branch 'domain'"):
        check_first_batch(GOOD | {"domain/masked_fraction": 0.5}, LIMITS)


def heldout_tree(prompts: int) -> Tree:
    measurement = {"pool": "medical", "teacher": "domain", "prompts": prompts}
    return camopd_tree(evaluate={"heldout": {"medical": measurement}})


def test_enough_heldout_prompts_pass() -> None:
    check_pools(make_pools(num_heldout=3), make_config(heldout_tree(3)))


def test_too_few_heldout_prompts_are_refused() -> None:
    message = r"evaluate\.heldout\.medical\.prompts: found 4, but pool 'medical' holds out 3"
    with pytest.raises(ConfigError, match=message):
        check_pools(make_pools(num_heldout=3), make_config(heldout_tree(4)))


def test_a_run_is_described_by_its_pools(tmp_path: Path) -> None:
    pool = make_pools(num_heldout=3)["medical"]
    longer = replace(pool.train[0], token_ids=tuple(range(9)))
    pools = {"medical": replace(pool, train=[longer, *pool.train[1:]])}
    assert describe_run(RunDir(tmp_path), pools) == [
        f"run directory {tmp_path}",
        "pool medical: 3 prompts to train on, 3 held out, 1 too long; 5 tokens on average, "
        "9 at most",
    ]


def test_an_export_that_another_run_made_is_refused(models: Path) -> None:
    (models / "old").mkdir()
    tree = tree_on(models, checkpoint={"export_dir": str(models / "old")})
    [problem] = problems(tree)
    assert re.match(r"checkpoint\.export_dir: found .* another run", problem)
