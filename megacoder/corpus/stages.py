"""The stages of a build in their order, the one place to add another.

*Scan stages* see one document as it is read and may change it. *Steps* run after every shard is read: dedup sees the
whole corpus, and slow checks see only what dedup leaves.
"""

from megacoder.corpus.check import DocumentPass
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.decontamination import Decontamination
from megacoder.corpus.dedup import ExactDedup
from megacoder.corpus.documents import Stage
from megacoder.corpus.generated import GeneratedFiles
from megacoder.corpus.leaks import HELD_OUT_STAGE
from megacoder.corpus.licenses import LicenseFilter
from megacoder.corpus.near_dedup import NearDedup
from megacoder.corpus.origin import MinifiedFiles, VendoredFiles
from megacoder.corpus.privacy import PersonalData, Secrets
from megacoder.corpus.rules import PaperRules
from megacoder.corpus.screening import Screening
from megacoder.corpus.starcoder2 import StarCoder2Rules
from megacoder.corpus.steps import Step

__all__ = ["scan_stages", "stage_names", "steps"]


def scan_stages(config: CorpusConfig) -> list[Stage]:
    """What each document goes through as it is read."""
    stages: list[Stage] = []
    if config.allow_licenses:
        stages.append(LicenseFilter(allow=config.allow_licenses))
    if config.drop_vendored:
        stages.append(VendoredFiles())
    rules = StarCoder2Rules if config.ruleset == "starcoder2" else PaperRules
    stages.append(rules(thresholds=config.rules))
    if config.drop_generated:
        stages.append(GeneratedFiles())
    if config.drop_minified:
        stages.append(MinifiedFiles())
    if config.secrets != "keep":
        stages.append(Secrets(handling=config.secrets))
    if config.personal_data != "keep":
        stages.append(PersonalData(handling=config.personal_data))
    return stages


def steps(config: CorpusConfig) -> list[Step]:
    """The steps between reading and writing.

    Repositories are compared before single files, so that the files that make two repositories alike are still there.
    """
    level = config.near_dedup.level
    found: list[Step] = [NearDedup("repository")] if level in ("repository", "both") else []
    if config.exact_dedup != "none":
        found.append(ExactDedup(config.exact_dedup))
    if level in ("file", "both"):
        found.append(NearDedup("file"))
    checks: list[Stage] = []
    if config.benchmarks:
        checks.append(Decontamination(benchmarks=config.benchmarks, config=config.decontamination))
    if config.screening.active:
        checks.append(Screening(config=config.screening))
    if checks:
        found.append(DocumentPass(checks))
    return found


def stage_names(config: CorpusConfig) -> list[str]:
    """The stages at which a file can be dropped, in order."""
    names = [stage.name for stage in scan_stages(config)]
    names += [name for step in steps(config) for name in step.names]
    return ["read", *dict.fromkeys(names), HELD_OUT_STAGE]
