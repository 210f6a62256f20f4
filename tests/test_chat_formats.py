"""A tuned model is asked in the format that it was trained with, wherever it comes from; the ids are transformers'."""

import io
import json
import shutil
from pathlib import Path

import pytest
import transformers
from command_line import refusal, run_command
from data_samples import small_tokenizer, write_jsonl
from test_sft import conversations, run_config

from megacoder.cli.eval_benchmark import _why_transformers
from megacoder.cli.loading import Loading
from megacoder.cli.main import main
from megacoder.cli.model_folder import chat_format_of, load_model
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.chat_template import SYSTEM
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.folder_settings import chat_template_in
from megacoder.evaluate.generate import generate
from megacoder.model.config import ModelConfig
from megacoder.parallel.tensor import ALONE
from megacoder.train.sft import sft

OWN = FormatConfig(
    kind="custom", system="Answer 'it' in C:\\n.\n", instruction="<|User|>{content}\n", response="<|Assistant|>",
    end=SPECIAL_TOKENS["eos"], after="",
)  # fmt: skip
FORMATS = {
    "chat": FormatConfig(), "script": FormatConfig(kind="script"), "own": OWN,
    "half": FormatConfig(kind="custom", instruction="{content}\n### Instruction above.\n", after="\n\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """name -> the folder of a run tuned in that format, and of its export."""
    folder = tmp_path_factory.mktemp("tuned")
    small_tokenizer().save(folder / "tokenizer")
    data = write_jsonl(folder / "data.jsonl", [{"instruction": "a", "output": "b"}])
    model = ModelConfig(
        vocab_size=small_tokenizer().vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    made = {}
    for name, chat in FORMATS.items():
        run = run_config(
            folder / name, folder / "tokenizer", data, chat=chat, model=model, steps=1, stream={"seq_length": 512}
        )
        sft(run)
        main(["checkpoint", "export", str(run.output), str(folder / f"{name}-exported")])
        made[name] = run.output, folder / f"{name}-exported"
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_run_checkpoint_export_and_import_are_asked_as_apply_chat_template_does(tuned, tmp_path, name):
    run, exported = tuned[name]
    main(["checkpoint", "import", str(exported), str(tmp_path / "imported")])
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").is_file(), "the template's other place"
    shutil.copyfile(exported / "config.json", tmp_path / "saved" / "config.json")
    [checkpoint] = (run / "checkpoints").glob("step-*")
    samples = conversations(60)
    assert {messages[0][0] for messages in samples} == {"system", "user"}
    assert any(len(messages) > 4 for messages in samples)
    for place in (run, checkpoint, exported, tmp_path / "imported", tmp_path / "saved"):
        ours = ChatFormat(chat_format_of(place), small_tokenizer())
        for messages in samples:
            asked = [{"role": role, "content": content} for role, content in messages[:-1]]
            expected = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            assert ours.prompt(messages[:-1]) == expected, place
        assert ours.end_id == theirs.eos_token_id, "what ends an answer"


def test_a_format_is_read_back_from_its_template_and_no_other_is_taken_for_it():
    for chat in FORMATS.values():
        found = FormatConfig.from_jinja(chat.jinja)
        assert found is not None
        assert found.resolved == chat.resolved
    published = (  # another layout of DeepSeek-Coder's texts, as its own folders have
        "{{bos_token}}{% if messages[0]['role'] != 'system' %}\n{{'" + SYSTEM + "\\n'}}\n{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{'### Instruction:\\n' + message['content'] + '\\n'}}{% else %}"
        "{{'### Response:\\n' + message['content'] + '\\n<|EOT|>\\n'}}{% endif %}{% endfor %}"
    )
    assert FormatConfig.from_jinja(published) == FormatConfig()
    assert FormatConfig.from_jinja(published.replace("'### Instruction:", "'### Question:")) is None
    assert FormatConfig.from_jinja("{{ messages[0].content }}") is None


def test_of_several_templates_the_default_one_counts(tmp_path):
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 2 }}"}]
    for templates, found in ((named, "{{ 2 }}"), (named[:1], None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        assert chat_template_in(tmp_path) == found


def test_a_template_of_another_form_is_named_and_one_of_the_tokenizers_folder_counts(tuned, tmp_path, capsys):
    run, exported = tuned["own"]
    assert chat_format_of(run, tokenizer=tuned["chat"][1]) == OWN, "the run knows best"
    assert chat_format_of(tmp_path, tokenizer=exported / "tokenizer.json") == OWN
    assert chat_format_of(tmp_path) == FormatConfig()
    settings = {"chat_template": [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "x"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert chat_format_of(tmp_path) == FormatConfig()
    assert capsys.readouterr().err == (
        f"{tmp_path}: a chat template of another form; asking in DeepSeek-Coder's format\n"
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_qwen_with_a_template_of_another_form_is_asked_by_transformers(tmp_path, kind):
    for name, template, asks in (("qwen", "{{ 1 }}", True), ("ours", OWN.jinja, False), ("base", None, False)):
        folder = tmp_path / name
        folder.mkdir()
        table = {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind}
        (folder / "config.json").write_text(json.dumps(table))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        assert _why_transformers(folder, instruct=True) == ("another chat template" if asks else None)
        assert _why_transformers(folder, instruct=False) is None


def test_a_mistral_is_asked_by_transformers_unless_its_tokenizer_can_be_used(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MistralForCausalLM"], "model_type": "mistral"}')
    assert _why_transformers(tmp_path, instruct=False) == "a tokenizer that is not byte-level BPE"
    small_tokenizer().save(tmp_path)
    assert _why_transformers(tmp_path, instruct=False) is None
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]")
    assert _why_transformers(tmp_path, instruct=True) == "another chat template"


@pytest.mark.parametrize("option", ["--tp 2", "--dtype float32", "--tokenizer {folder}"])
def test_what_transformers_would_ignore_is_refused(tmp_path, capsys, option):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    task = {
        "task_id": "0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert f() is None\n",
        "canonical_solution": "    pass\n",
    }
    data = write_jsonl(tmp_path / "data.jsonl", [task])
    option = option.format(folder=tmp_path)
    said = refusal(capsys, "eval", "humaneval", "--data", data, "--model", tmp_path, *option.split(), code=2)
    assert said == (
        f"megacoder: {option}: {tmp_path} has the architecture GPT2LMHeadModel, so that transformers runs it as it is "
        f"stored, in one process; leave {option.split()[0]} out\n"
    )


def asked_by(monkeypatch, place: str, words: list[str]) -> list[dict]:
    """What `place` passes to `generate` while a command runs, and what comes back."""
    seen: list[dict] = []

    def record(model, prompts, **options):
        answers = generate(model, prompts, **options)
        seen.append({"prompts": [list(prompt) for prompt in prompts], "answers": answers, **options})
        return answers

    monkeypatch.setattr(f"{place}.generate", record)
    main(words)
    return seen


@pytest.mark.parametrize("kind", ["run", "export"])
def test_chat_and_eval_ask_in_the_format_and_stop_at_its_end(tuned, tmp_path, monkeypatch, kind):
    folder = tuned["own"][0 if kind == "run" else 1]
    _, tokenizer = load_model(folder, Loading(), tp=ALONE)
    ours = ChatFormat(OWN, tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO(" one\ntwo\n"))
    first, second = asked_by(
        monkeypatch, "megacoder.cli.model_folder", ["chat", "--model", str(folder), "--max-new-tokens", "3"]
    )
    assert first["prompts"] == [ours.prompt([("user", "one")])]
    answer = tokenizer.decode(first["answers"][0])
    assert second["prompts"] == [ours.prompt([("user", "one"), ("assistant", answer), ("user", "two")])]
    assert first["stop_ids"] == {tokenizer.eos_id}, "where this format ends an answer"

    row = {"task_id": "1", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1)\n"}
    data = Path(write_jsonl(tmp_path / "tasks.jsonl", [row]))
    words = ["eval", "humaneval", "--instruct", "--data", str(data), "--model", str(folder), "--max-new-tokens", "3"]
    [seen] = asked_by(monkeypatch, "megacoder.evaluate.benchmarks.local", words)
    [prompt] = seen["prompts"]
    begin = ours.prompt([("user", "")]).index(tokenizer.control_id("user")) + 1
    assert prompt[:begin] == ours.prompt([("user", "")])[:begin]
    assert prompt[-1] == tokenizer.control_id("assistant")
    assert seen["stop_ids"] == {tokenizer.eos_id}


def test_a_tuned_model_keeps_its_format_with_another_tokenizer_folder(tuned, tmp_path, capsys):
    run, exported = tuned["own"]
    base = tmp_path / "base"
    shutil.copytree(tuned["chat"][1], base)
    (base / "chat_template.jinja").write_text("{{ 1 }}")
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": SPECIAL_TOKENS["eot"]}))
    main(["checkpoint", "export", str(run), str(tmp_path / "with-base"), "--tokenizer", str(base)])
    for file in ("tokenizer_config.json", "config.json", "generation_config.json", "tokenizer.json"):
        made, own = (json.loads((folder / file).read_text()) for folder in (tmp_path / "with-base", exported))
        assert made == own, file
    assert chat_format_of(tmp_path / "with-base") == OWN
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "with-base")
    assert (theirs.chat_template, theirs.eos_token) == (OWN.jinja, SPECIAL_TOKENS["eos"])

    definition = (base / "tokenizer.json").read_text().replace(SPECIAL_TOKENS["eos"], "<absent>")
    (base / "tokenizer.json").write_text(definition)
    capsys.readouterr()
    code, _, err = run_command(capsys, "checkpoint", "export", run, tmp_path / "other", "--tokenizer", base)
    assert code == 1
    assert f"tokenizer.json: no token that ends {SPECIAL_TOKENS['eos']!r}, as answers do" in err


def test_answers_asked_for_in_another_format_are_not_reused(tuned, tmp_path, capsys):
    model = tmp_path / "imported"
    main(["checkpoint", "import", str(tuned["own"][1]), str(model)])
    row = {"task_id": "1", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1)\n"}
    data = write_jsonl(tmp_path / "tasks.jsonl", [row])
    words = ["eval", "humaneval", "--instruct", "--data", data, "--model", model, "--max-new-tokens", "3"]
    words += ["--out", tmp_path / "out"]
    for _ in range(2):
        assert run_command(capsys, *words)[0] == 0
    settings = model / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": FORMATS["script"].jinja}))
    code, _, err = run_command(capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "settings.json: made with chat_format = " in err
