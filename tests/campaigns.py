"""A tiny campaign that runs in seconds: its text, data config, scale and folders."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.campaign.worker import WorkerConfig
from epochal.records import Records, Workspace, load_records
from epochal.scale import Scale, load_scale

DATA = """
licence = "made by the tests"
[source]
files = ["{corpus}"]
separator = "--"
[tokenizer]
train = 300
[split]
validation = 0.1
test = 0.05
"""

SCALE = """
data = "{data}"
unique_tokens = [2048]
sequence_length = 32
batch_size = 4
precision = "fp32"
warmup = 0.05
num_evals = 2

[grid]
lr = [0.01]
epochs = [1, 2]
wd = [0.1, 0.8]

[[ladder]]
model = "w16"
lr = 0.01
epochs = 1
wd = 0.8

[epoching]
sweep_model = "w16"

[ensembling]
models = ["w16"]
count = 2

[distillation]
model = "w16"
fraction = 0.5
pool_tokens = 512
epochs = 1
lr = 0.01
wd = 0.8
max_length = 48

[hardware]
device = "one CPU core"
flops = 1e10
"""


@dataclass(frozen=True)
class Campaign:
    """A folder with a scale, its data config and its token store, as a user would have them."""

    folder: Path

    @property
    def scale_path(self) -> Path:
        return self.folder / "tiny-scale.toml"

    @property
    def scale(self) -> Scale:
        return load_scale(str(self.scale_path))

    @property
    def workspace(self) -> Workspace:
        return Workspace("tiny-scale", self.folder / "results", self.folder / "work")

    @property
    def records(self) -> Records:
        return load_records(self.workspace)

    @property
    def options(self) -> list[str]:
        """The options of every command that reads this campaign."""
        return [
            *("--scale", str(self.scale_path)),
            *("--results", str(self.folder / "results")),
            *("--work", str(self.folder / "work")),
        ]

    def worker_config(self, *recipes: str, session: str = "first", **changes: Any) -> WorkerConfig:
        """What `epochal run RECIPES` hands to a worker; `changes` replace fields."""
        return WorkerConfig(
            session=session,
            scale=str(self.scale_path),
            recipes=recipes,
            results=str(self.folder / "results"),
            work=str(self.folder / "work"),
            threads=1,
            **changes,
        )

    def rewrite(self, old: str, new: str) -> None:
        """Change the scale file."""
        text = self.scale_path.read_text()
        assert old in text
        self.scale_path.write_text(text.replace(old, new))


def made_text(seed: int = 0, documents: int = 150) -> str:
    """Return English-looking documents with some structure to learn, separated by lines of two dashes."""
    source = random.Random(seed)
    words = ["".join(source.choices("aeioulnrst", k=source.randint(2, 6))) for _ in range(80)]
    return "\n--\n".join(
        "\n".join(" ".join(source.choices(words, k=8)) + "." for _ in range(source.randint(2, 8)))
        for _ in range(documents)
    )


def make_campaign(folder: Path, prepared: Path) -> Campaign:
    """Fill a folder with the tiny campaign."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny-scale.toml").write_text(SCALE.format(data=prepared / "tiny.toml"))
    shutil.copytree(prepared / "work" / "data", folder / "work" / "data")
    return Campaign(folder)
