"""Settings out of range: each class of settings refuses its own by name and value, before anything is done."""

import math
import re

import pytest
from tiny_models import tiny_config

from megacoder.checkpoint.writer import CheckpointConfig
from megacoder.cli.quickstart.options import QuickstartOptions
from megacoder.core.errors import ConfigError
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.rules import RuleThresholds
from megacoder.corpus.samples import SampleConfig
from megacoder.corpus.screening import ScreeningConfig
from megacoder.corpus.split import SplitConfig
from megacoder.data.megatron_stream import MegatronConfig
from megacoder.evaluate.sampling import Sampling
from megacoder.ops.adamw import AdamWConfig
from megacoder.train.guard import GuardConfig
from megacoder.train.schedule import ScheduleConfig

REFUSED = {
    AdamWConfig: [
        ({"beta1": 1.0}, "beta1"), ({"beta1": 1 - 1e-8}, "beta1"), ({"beta2": -0.1}, "beta2"), ({"eps": 0.0}, "eps"),
        ({"eps": 1e-46}, "eps"), ({"weight_decay": math.nan}, "weight_decay"), ({"weight_decay": -1.0}, "weight_decay"),
    ],
    GuardConfig: [
        ({"loss_spike": 1.0}, "loss_spike"), ({"grad_norm_spike": math.inf}, "grad_norm_spike"),
        ({"window": 0}, "window"), ({"max_skipped": 0}, "max_skipped"),
        ({"compare_replicas_every": -1}, "compare_replicas_every"),
    ],
    CheckpointConfig: [
        ({"keep_last": 0}, "checkpoint.keep_last = 0"), ({"keep_every": 0}, "checkpoint.keep_every = 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"), ({"timeout_seconds": math.nan}, "timeout_seconds"),
    ],
    ScheduleConfig: [
        ({"decay_share": 0.0}, "schedule.decay_share = 0.0: must be above 0"),
        ({"decay_share": 1.1}, "schedule.decay_share = 1.1"),
    ],
    Sampling: [
        ({"temperature": -1.0}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k = -1"),
    ],
    MegatronConfig: [
        ({"num_samples": 0}, "data.megatron.num_samples = 0"), ({"consumed_samples": -1}, "consumed_samples"),
        ({"split": ()}, "data.megatron.split"),
        ({"split": (0.0, 1.0)}, "split"), ({"split": (-1.0,)}, "split"),
    ],
    tiny_config: [
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7"), ({"hidden_size": 0}, "hidden_size = 0"),
        ({"rope_factor": 0.0}, "rope_factor = 0.0"),
    ],
    NearDedupConfig: [
        ({"similarity": 0.0}, "similarity = 0.0"), ({"num_hashes": 100}, "num_hashes = 100: must be a multiple of 64"),
        ({"bands": 65, "rows": 4}, "bands x rows = 65 x 4: there are only 256"), ({"ngram": 0}, "ngram = 0"),
    ],
    ScreeningConfig: [
        ({"strict_share": 1.5}, "strict_share = 1.5"), ({"usual_share": -0.1}, "usual_share = -0.1"),
        ({"off": ("Pyton",)}, "'Pyton' (did you mean 'Python'?) is not a language that is screened"),
    ],
    RuleThresholds: [
        ({"max_line": 0}, "max_line = 0: must be at least 1"),
        ({"max_mean_line": 0.5}, "max_mean_line = 0.5: must be at least 1"),
        ({"max_mean_line": math.nan}, "max_mean_line = nan"),
        ({"data_max_chars": -1}, "data_max_chars = -1: must be at least 1"),
        ({"html_min_visible": -1}, "html_min_visible = -1: must be at least 0"),
        ({"min_alphabetic": 25.0}, "min_alphabetic = 25.0: must be between 0 and 1"),
        ({"data_min_chars": 6000}, "data_min_chars = 6000: must be at most data_max_chars = 5000"),
    ],
    SplitConfig: [({"fraction": 1.0}, "heldout"), ({"fraction": -0.1}, "heldout"), ({"max_bytes": 0}, "heldout")],
    SampleConfig: [({"max_bytes": 0}, "at least 1")],
    QuickstartOptions: [
        ({"minutes": 0.0}, "0"), ({"minutes": math.inf}, "inf"), ({"steps": 0}, "0"), ({"nproc": 0}, "0"),
        ({"vocab_size": 10}, "10"), ({"max_repo_megabytes": -1.0}, "-1"),
    ],
}  # fmt: skip


ROWS = {f"{made.__name__} {changes}": (made, changes, said) for made, rows in REFUSED.items() for changes, said in rows}


@pytest.mark.parametrize(("made", "changes", "said"), ROWS.values(), ids=ROWS)
def test_settings_out_of_range_are_refused(made, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        made(**changes)


def test_settings_at_the_edge_of_their_range_are_not():
    RuleThresholds(max_mean_line=1, max_line=1, min_alphabetic=0, html_min_visible=0, data_min_chars=0)
