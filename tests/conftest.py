"""Shared by all tests: two threads at most, so that results and time do not depend on the machine's size.

`tests/` and `tools/` are no packages: their modules import each other by bare name. pytest puts this folder on the path
because this file lies in it, and `tools/` because pyproject.toml says so (`pythonpath`); a script run by its path has
its own folder there.
"""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it as it is imported, which the library may do: so it is set before the library's first import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ranks import RankPool


def pytest_configure():
    """A background job inherits an ignored SIGINT, and would hand it on to the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def asked(monkeypatch):
    """Sets what MEGACODER_OPS asks for, as a new process would read it."""
    from megacoder.ops import backends

    def ask(text):
        monkeypatch.setattr(backends, "_asked", lambda: backends.parse_choices(text))
        backends.candidates.cache_clear()

    yield ask
    backends.candidates.cache_clear()


@pytest.fixture
def torch_alone(asked):
    """Every op runs on its reference."""
    from megacoder.ops.backends import OPS

    asked(",".join(f"{op}=torch" for op in OPS))


@pytest.fixture(params=["compiled", "no amx", "torch"])
def backend(request, asked, monkeypatch):
    """Runs a test once with the kernels that are chosen here, and once on the torch paths that replace them.

    On a CPU those include torch's own flash attention, which serves where our kernels are not built. CPUs with AMX run
    it a third time, with the kernels of those without.
    """
    from megacoder.ops import backends, cpp

    on_gpu = torch.cuda.is_available()
    if request.param == "no amx":
        if on_gpu or not cpp.has_amx():
            pytest.skip("these are the kernels that are chosen here")
        monkeypatch.setattr(cpp, "has_amx", lambda: False)
    elif request.param == "torch" and on_gpu:
        asked(",".join(f"{op}=torch" for op in backends.OPS))
    elif request.param == "torch":
        monkeypatch.setattr(cpp, "_cpp", None)
    elif not cpp.is_built() and not on_gpu:
        pytest.skip("the C++ kernels are not built here")
    backends.candidates.cache_clear()
    yield request.param
    backends.candidates.cache_clear()


@pytest.fixture(scope="session")
def ranks():
    """Runs functions on several gloo ranks; see `ranks.RankPool`."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """A tokenizer's folder as Llama 3's; not to be changed."""
    from tokenizer_folders import write_llama3

    return write_llama3(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """One as Qwen's; not to be changed."""
    from tokenizer_folders import write_qwen

    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def starcoder(tmp_path_factory):
    """One as StarCoder's; not to be changed."""
    from tokenizer_folders import write_starcoder

    return write_starcoder(tmp_path_factory.mktemp("starcoder"))
