"""ChatML, and chat formats of tokenizers whose line breaks are not tokens of their own: the ids are transformers'."""

import io
import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from command_line import refusal, run_command
from data_samples import small_tokenizer, write_jsonl
from test_chat_formats import asked_by
from test_sft import conversations, joined, run_config
from tokenizer_folders import LLAMA3, write_folder
from tokenizers import normalizers

from megacoder.cli.eval_benchmark import _why_transformers
from megacoder.cli.main import main
from megacoder.cli.model_folder import chat_format_of
from megacoder.core.errors import ConfigError, FormatError
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.chatml import QWEN_SYSTEM
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.folder_settings import chat_template_in
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import extended_files
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import export_model
from megacoder.model.init import init_weights
from megacoder.model.transformer import Transformer
from megacoder.train.sft import sft

CHATML = FormatConfig(kind="chatml")
WITH_TOOLS = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n{\"name\": <it's name>}<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\n{"name": "' }}
            {{- tool_call.name }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
"""As Qwen2.5's published template, its texts about tools shortened."""
TURNS = (
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "published": (WITH_TOOLS, QWEN_SYSTEM, False),
    "by loop": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ \"<|im_start|>system\\nYou aren't\tone.<|im_end|>\\n\" }}{% endif %}" + TURNS, "You aren't\tone.", False,
    ),
    "no system": ("{% for message in messages %}" + TURNS, "", False),
    "bos": ("{{ bos_token }}{% for message in messages %}" + TURNS, "", True),
    "lines": (
        "{% if not add_generation_prompt is defined %}\n  {% set add_generation_prompt = false %}\n{% endif %}\n"
        "{% for message in messages %}" + TURNS + "\n", "", False,
    ),
}  # fmt: skip
"""name -> a template, its system text, whether it begins with BOS"""
WHITE = ["\n\n  x = 1\n", "\r\ny", "  \n z", "\n"]
"""Answers whose beginning a template's text joins with the line break before it."""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder as Qwen2.5's: NFC, no BOS, tokens that hold line breaks with other text, the published template."""
    folder = tmp_path_factory.mktemp("qwen")
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    write_folder(
        folder, LLAMA3.replace("{1,3}", ""), controls, normalizer=normalizers.NFC(), bos_token=None,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=WITH_TOOLS,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A tokenizer with a BOS whose tokens hold line breaks with other text, too, extended by what formats need."""
    folder = tmp_path_factory.mktemp("llama3")
    controls = ["<|begin|>", "<|end|>"]
    write_folder(folder, LLAMA3, controls, bos_token="<|begin|>", eos_token="<|end|>")
    main(["tokenizer", "extend", str(folder), "--output", str(folder / "new"), "--add", "<|im_start|>", "<|im_end|>"])
    return folder / "new"


@pytest.fixture(scope="module")
def deepseeks(tmp_path_factory):
    """DeepSeek-Coder's own tokenizer with the two tokens of ChatML."""
    folder = tmp_path_factory.mktemp("deepseeks")
    small_tokenizer().save(folder / "base")
    words = ["--output", str(folder / "new"), "--add", "<|im_start|>", "<|im_end|>"]
    main(["tokenizer", "extend", str(folder / "base"), *words])
    return folder / "new"


def theirs_of(folder: Path, template: str):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    return theirs


def rendered(messages):
    return [{"role": role, "content": content} for role, content in messages]


def with_white_space(samples):
    return [
        [(role, WHITE[number % 4] + text if role == "assistant" else text) for role, text in messages]
        for number, messages in enumerate(samples)
    ]


@pytest.mark.parametrize("name", ["qwen", "llama3", "deepseeks"])
@pytest.mark.parametrize(
    "chat", [CHATML, replace(CHATML, system="Be brief."), replace(CHATML, system="", bos=False)],
    ids=["default", "own", "none"],
)  # fmt: skip
def test_ids_equal_those_of_apply_chat_template(name, chat, request):
    folder = request.getfixturevalue(name)
    theirs, ours = theirs_of(folder, chat.jinja), ChatFormat(chat, Tokenizer.load(folder))
    samples = conversations(60)
    assert {messages[0][0] for messages in samples} == {"system", "user"}
    assert any(len(messages) > 4 for messages in samples)
    for messages in samples:
        assert joined(ours.segments(messages)) == theirs.apply_chat_template(rendered(messages), return_dict=False)
        asked = theirs.apply_chat_template(rendered(messages[:-1]), add_generation_prompt=True, return_dict=False)
        assert ours.prompt(messages[:-1]) == asked


@pytest.mark.parametrize("kind", ["chat", "chatml"])
def test_the_prompt_is_what_was_trained_whatever_the_answer_begins_with(kind, llama3, qwen):
    """Also where the answers before have no loss; text that is rendered at once has other ids then."""
    folder = llama3 if kind == "chat" else qwen
    chat = FormatConfig(kind=kind)
    theirs, ours = theirs_of(folder, chat.jinja), ChatFormat(chat, Tokenizer.load(folder))
    assert not ours.tokenizer.splits_lines
    ordinary = conversations(30)
    for messages in ordinary:
        assert joined(ours.segments(messages)) == theirs.apply_chat_template(rendered(messages), return_dict=False)
    num_different = 0
    for messages in with_white_space(ordinary):
        whole = joined(ours.segments(messages))
        at_once = theirs.apply_chat_template(rendered(messages), return_dict=False)
        assert ours.tokenizer.decode(whole) == ours.tokenizer.decode(at_once)
        num_different += whole != at_once
        for number, (role, _) in enumerate(messages):
            if role == "assistant":
                prompt = ours.prompt(messages[:number])
                assert whole[: len(prompt)] == prompt
        last = ours.segments(messages, trained={len(messages) - 1})
        assert (joined(last), len(last)) == (whole, 3)
    assert num_different > 5 or kind == "chat"  # there, no token holds `:` and two line breaks


@pytest.mark.parametrize("name", ["qwen", "deepseeks"])
def test_answers_and_the_token_that_ends_them_are_trained_and_nothing_else(name, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(name))
    ours = ChatFormat(CHATML, tokenizer)
    one, two = [("user", "one"), ("assistant", "uno")], [("user", "2"), ("assistant", "\n<|im_end|>")]
    segments = ours.segments([("system", "Be brief."), *one, *two])
    assert [segment.trained for segment in segments] == [False, True, False, True, False]
    bos = tokenizer.decode([tokenizer.bos_id]) if tokenizer.has_bos else ""
    assert [tokenizer.decode(segment.ids) for segment in segments] == [
        f"{bos}<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        "uno<|im_end|>", "\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n", "\n<|im_end|><|im_end|>", "\n",
    ]  # fmt: skip
    assert ours.end_id == tokenizer.control_ids["<|im_end|>"]
    assert segments[3].ids == [*tokenizer.encode("\n<|im_end|>"), ours.end_id], "what a message quotes stays text"
    assert joined(segments).count(ours.end_id) == 5


def test_a_prompt_begins_with_bos_only_where_there_is_one(qwen, llama3):
    for folder, first in ((qwen, "<|im_start|>"), (llama3, "<|begin|>")):
        tokenizer = Tokenizer.load(folder)
        assert ChatFormat(CHATML, tokenizer).prompt([("user", "a")])[0] == tokenizer.control_ids[first]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["qwen", "llama3"])
def test_published_templates_are_recognized(name, place, request):
    folder = request.getfixturevalue(place)
    template, system, bos = TEMPLATES[name]
    found = FormatConfig.from_jinja(template)
    assert found == FormatConfig(kind="chatml", system=system, bos=bos)
    theirs, ours = theirs_of(folder, template), ChatFormat(found, Tokenizer.load(folder))
    for messages in conversations(20):
        asked = theirs.apply_chat_template(rendered(messages[:-1]), add_generation_prompt=True, return_dict=False)
        assert ours.prompt(messages[:-1]) == asked


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("published", "{%- else %}\n    {%- if", "{%- else %}\n    {{- 'Today' }}\n    {%- if"),
        ("published", "{%- if tools %}", "{%- if not tools %}"),
        ("published", "{%- if tools %}", "{%- if tools or messages %}"),
        ("published", "message.content +", "message.content | trim +"),
        ("published", "+ message.content", "+ content"),
        ("published", '{%- elif message.role == "assistant" %}', '{%- elif message.role == "user" %}'),
        ("published", "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"),
        ("published", "{%- if add_generation_prompt %}", "{%- if not add_generation_prompt %}"),
        ("published", "{%- for message in messages %}", "{%- for message in messages[1:] %}"),
        ("published", "{%- for message in messages %}", "{%- set content = '' %}{%- for message in messages %}"),
        ("by loop", "{% endif %}{{'<", "{% else %}{{'<|im_start|>system\\n<|im_end|>\\n'}}{% endif %}{{'<"),
        ("no system", "{% for", "Hello{% for"),
        ("no system", "'}}{% endfor", "'}}\n{% endfor"),
        ("no system", "'<|im_end|>' + '\\n'", "'<|im_end|>'"),
        ("no system", "message['role']", "message['role'] | upper"),
        ("no system", "{% for message in messages %}", "{% for message in messages %}{{ bos_token }}"),
    ],
)  # fmt: skip
def test_a_template_that_prints_anything_else_is_of_another_form(name, old, new):
    template = TEMPLATES[name][0]
    assert old in template
    assert FormatConfig.from_jinja(template.replace(old, new)) is None


OWN = FormatConfig(
    kind="custom", system="", system_message="<|a|>{content}\n", instruction="<|b|>{content}", response="<|c|>:\n",
    end="</s>", after="<|d|>\n", bos=False,
)  # fmt: skip


def test_a_format_may_use_any_control_token(llama3):
    files = {name: (llama3 / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    size = Tokenizer.load(llama3).vocab_size
    added = ["<|a|>", "<|b|>", "<|c|>", "<|d|>", "</s>", "<|c|>:"]
    files = extended_files(files, {text: size + number for number, text in enumerate(added)}, llama3)
    tokenizer = Tokenizer(files["tokenizer.json"], {"bos": "<|begin|>", "eos": "<|end|>"})
    a, b, _, d, end, longer = range(size, size + 6)
    segments = ChatFormat(OWN, tokenizer).segments([("system", "s"), ("user", "u"), ("assistant", "an</s>")])
    encode = tokenizer.encode
    assert joined(segments) == [
        a, *encode("s\n"), b, *encode("u"), longer, *encode("\n"), *encode("an</s>"), end, d, *encode("\n")
    ]  # fmt: skip
    assert FormatConfig.from_jinja(OWN.jinja) == OWN
    assert OWN.end_token(tokenizer.control_ids) == "</s>"


def test_the_format_of_llama3_in_the_readme_has_the_ids_of_its_template(tmp_path):
    """Which trims contents: these have no white space around."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^\[data\.conversations\.format\] +# Llama 3's.*?(?=^```)", text, re.MULTILINE | re.DOTALL)
    chat = FormatConfig(**tomllib.loads(block[0])["data"]["conversations"]["format"])
    controls = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    folder = write_folder(tmp_path, LLAMA3, controls, bos_token=controls[0], eos_token=controls[1])
    head = "<|start_header_id|>{{ %s }}<|end_header_id|>{{ '\\n\\n' }}"
    turn = head % "message.role" + "{{ message.content | trim }}<|eot_id|>"
    turns = "{% for message in messages %}" + turn + "{% endfor %}"
    asking = "{% if add_generation_prompt %}" + head % "'assistant'" + "{% endif %}"
    theirs = theirs_of(folder, "{{ bos_token }}" + turns + asking)
    ours = ChatFormat(chat, Tokenizer.load(folder))
    for messages in conversations(20):
        stripped = [(role, content.strip()) for role, content in messages]
        assert joined(ours.segments(stripped)) == theirs.apply_chat_template(rendered(stripped), return_dict=False)
        asked = theirs.apply_chat_template(rendered(stripped[:-1]), add_generation_prompt=True, return_dict=False)
        assert ours.prompt(stripped[:-1]) == asked
    assert FormatConfig.from_jinja(chat.jinja) == chat


@pytest.mark.parametrize("chat", [OWN, CHATML, replace(OWN, after=""), replace(OWN, end="\n<|EOT|>", bos=True)])
def test_a_template_of_any_texts_is_read_back(chat):
    found = FormatConfig.from_jinja(chat.jinja)
    assert found is not None
    assert found.resolved == chat.resolved


LACKING = (
    "chat format, '<|im_start|>assistant\\n': the tokenizer has no control token '<|im_start|>', only "
    f"{', '.join(map(repr, list(SPECIAL_TOKENS.values())[:6]))}, ...; to add what is missing: megacoder tokenizer "
    "extend TOKENIZER --output NEW --add '<|im_start|>' '<|im_end|>'"
)


@pytest.mark.parametrize(
    ("chat", "error", "message"),
    [
        (CHATML, FormatError, LACKING),
        (FormatConfig(kind="custom", end="[/END]"), ConfigError,
         "chat format, end = '[/END]': does not end with a control token of the tokenizer ('<｜begin"),
        (FormatConfig(kind="custom", response="[A]"), ConfigError,
         "chat format, response = '[A]': must end with a line break or a control token of the tokenizer ('<｜begin"),
    ],
)  # fmt: skip
def test_what_a_format_needs_of_a_tokenizer_is_checked_with_it(chat, error, message):
    with pytest.raises(error) as raised:
        ChatFormat(chat, small_tokenizer())
    assert message in str(raised.value)


def test_tokens_that_extending_adds_in_any_case_are_not_named_for_it(qwen):
    with pytest.raises(FormatError, match=rf"'<\|EOT\|>', only '<\|endoftext.* extend {qwen} --output NEW$"):
        ChatFormat(FormatConfig(), Tokenizer.load(qwen))


@pytest.fixture(scope="module")
def models(qwen, deepseeks, tmp_path_factory):
    """name -> folder of a Hugging Face model with the tokenizer, of a run tuned from it, and of that run's export"""
    made = {}
    for name, tokenizer in (("qwen", qwen), ("deepseeks", deepseeks)):
        folder = tmp_path_factory.mktemp(name)
        config = ModelConfig(
            vocab_size=Tokenizer.load(tokenizer).vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
            qkv_bias=name == "qwen",
        )  # fmt: skip
        model = Transformer(config)
        init_weights(model, seed=0)
        export_model(model, folder / "base", dtype=torch.float32, tokenizer_folder=tokenizer)
        main(["checkpoint", "import", str(folder / "base"), str(folder / "start")])
        data = write_jsonl(folder / "data.jsonl", [{"instruction": "a", "output": "b"}])
        run = run_config(
            folder / "run", folder / "start" / "tokenizer", Path(data), chat=CHATML, model=config, steps=1,
            stream={"seq_length": 512}, init_from=folder / "start",
        )  # fmt: skip
        sft(run)
        main(["checkpoint", "export", str(run.output), str(folder / "out")])
        made[name] = folder / "base", run.output, folder / "out"
    return made


@pytest.mark.parametrize("name", ["qwen", "deepseeks"])
def test_an_export_stops_where_the_format_ends_and_renders_what_was_trained(models, name):
    _, run, out = models[name]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), Tokenizer.load(out)
    end = ours.control_ids["<|im_end|>"]
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|im_end|>", end)
    for file in ("generation_config.json", "config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == [end, ours.eos_id]
    assert chat_template_in(out) == CHATML.jinja == chat_template_in(run / "tokenizer")
    for place in (run, out):
        format = chat_format_of(place)
        assert format.resolved == CHATML.resolved
        for messages in conversations(20):
            expected = theirs.apply_chat_template(rendered(messages), return_dict=False)
            assert joined(ChatFormat(format, ours).segments(messages)) == expected


@pytest.mark.parametrize("place", ["base", "run", "out"])
@pytest.mark.parametrize("name", ["qwen", "deepseeks"])
def test_chat_eval_and_generate_stop_where_the_format_ends(models, name, place, tmp_path, monkeypatch):
    """Also a model that comes with Qwen2.5's published template."""
    folder = models[name][["base", "run", "out"].index(place)]
    if (name, place) == ("deepseeks", "base"):
        return  # it is asked in DeepSeek-Coder's format
    tokenizer = Tokenizer.load(folder / "tokenizer" if place == "run" else folder)
    ours, end = ChatFormat(CHATML, tokenizer), tokenizer.control_ids["<|im_end|>"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    few = ["--model", str(folder), "--max-new-tokens", "3"]
    [seen] = asked_by(monkeypatch, "megacoder.cli.model_folder", ["chat", *few])
    assert seen["prompts"] == [ours.prompt([("user", "one")])]
    assert end in seen["stop_ids"]
    [seen] = asked_by(monkeypatch, "megacoder.cli.model_folder", ["generate", "--prompt", "x", *few])
    assert end in seen["stop_ids"]
    assert _why_transformers(folder, instruct=True) is None
    row = {"task_id": "1", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1)\n"}
    data = Path(write_jsonl(tmp_path / "tasks.jsonl", [row]))
    words = ["eval", "humaneval", "--instruct", "--data", str(data), *few]
    [seen] = asked_by(monkeypatch, "megacoder.evaluate.benchmarks.local", words)
    frame = ours.prompt([("user", "")])
    assert seen["prompts"][0][:8] == frame[:8]
    assert seen["prompts"][0][-3:] == frame[-3:]
    assert end in seen["stop_ids"]


def test_a_format_that_the_tokenizer_lacks_tokens_for_starts_nothing(tmp_path, capsys):
    small_tokenizer().save(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}])
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'output = "{tmp_path / "run"}"\n[data]\ntokenizer = "{tmp_path / "tokenizer"}"\n'
        f'[data.conversations]\ntrain = ["{data}"]\nformat = {{ kind = "chatml" }}\n'
        f"[model]\nvocab_size = {small_tokenizer().vocab_size}\n"
    )
    assert "--add '<|im_start|>' '<|im_end|>'" in refusal(capsys, "sft", toml)
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_token_that_the_files_do_not_mark_cannot_come_out_of_a_text(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "copy")
    definition = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    assert not any(token["special"] for token in definition["added_tokens"])
    tokenizer = Tokenizer.load(tmp_path / "copy")
    assert not {*tokenizer.encode("<|im_start|>a<|im_end|>")} & {*tokenizer.control_ids.values()}


def test_tokenizer_extend_knows_no_more_of_qwen(qwen, tmp_path, capsys):
    code, _, said = run_command(capsys, "tokenizer", "extend", qwen, "--output", tmp_path / "new")
    assert code == 0, said
    assert chat_template_in(tmp_path / "new") == WITH_TOOLS
