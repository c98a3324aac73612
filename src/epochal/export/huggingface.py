"""Export a finished run or ensemble to a folder: weights, tokenizer, record, model card, optionally GGUF."""

import html
import shutil
from pathlib import Path
from typing import Any

from epochal.config import find_config, flat_table, load_toml, replaced_folder, to_table
from epochal.data.prepare import DataConfig
from epochal.export.gguf import write_gguf
from epochal.models.ensemble import CODE, copy_tokenizer
from epochal.models.folder import complete
from epochal.models.load import RECORD, load_source, member_records
from epochal.records import Record, Records, Workspace, file_hash
from epochal.run import SOUP, Ensemble, Run, Samples


def export(name: str, folder: Path, workspace: Workspace, records: Records, *, gguf: bool = False) -> None:
    """Write the model of the finished job `name` to the new `folder`; with `gguf` also as model.gguf.

    `loading_lines` says how to load it. Raises ValueError and leaves no folder if the job is not a model, its weights are
    missing, the folder exists, or GGUF does not support the model.
    """
    record = records.named(name)
    if record is None or isinstance(record.job, Samples):
        raise ValueError(f"{name!r} is not a finished model; name a run or an ensemble.")
    # An exported folder may be published already, so it is never overwritten.
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder.")
    if gguf and has_code(record):
        raise ValueError("GGUF does not support ensembles; export a member or a student, or leave --gguf out.")
    with replaced_folder(folder) as temporary:
        _write_weights(record, temporary, workspace, records)
        source = workspace.records / f"{name}.json"
        shutil.copy(source, temporary / RECORD)
        if gguf:
            write_gguf(temporary, temporary / "model.gguf", name=name)
        card = model_card(record, member_records(name, records), record_hash=file_hash(source))
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _write_weights(record: Record, folder: Path, workspace: Workspace, records: Records) -> None:
    """Copy a run's model folder; load and save an ensemble."""
    name = record.job.name
    if isinstance(record.job, Ensemble):
        members = member_records(name, records)
        load_source(name, workspace, records).save_pretrained(folder)
        copy_tokenizer(workspace.folder(members[0].job.name) / "model", folder)
        for k, member in enumerate(members):
            member_folder = folder / f"member-{k:02d}"
            member_folder.mkdir(exist_ok=True)  # new if parameters were averaged: then it has only the record
            shutil.copy(workspace.records / f"{member.job.name}.json", member_folder / RECORD)
            complete(member_folder)
        complete(folder)
        return
    source = workspace.folder(name) / "model"
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; run {name!r} again to make its weights.")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    complete(folder)  # models of earlier versions are not


def has_code(record: Record) -> bool:
    """Whether the exported folder has modeling code of its own: an ensemble of several models."""
    return isinstance(record.job, Ensemble) and record.job.average != SOUP


def loading_lines(record: Record, folder: str) -> str:
    """Return the Python lines that load an exported folder, with transformers 4.57 or later."""
    option = ", trust_remote_code=True" if has_code(record) else ""
    return (
        f"model = AutoModelForCausalLM.from_pretrained({folder!r}{option})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r}{option})"
    )


def model_card(record: Record, members: list[Record], *, record_hash: str) -> str:
    """Return the text of README.md: description, losses, data and license, recipe, usage.

    `members` are the records of the single models; the record itself for a run.
    """
    run = members[0].job
    assert isinstance(run, Run)
    data = load_toml(find_config("data", run.data, ".toml"), DataConfig)
    losses = {"validation loss": record.results.get("loss"), "test loss": record.results.get("test_loss")}
    facts = {
        **{name: f"{loss:.4f} nats per token" for name, loss in losses.items() if loss is not None},
        "parameters": f"{record.results['parameters']:,}",
        "data": run.data,
        "licence of the data": data.licence,
        "unique training tokens": f"{run.unique_tokens:,}",
        "context": f"{run.sequence_length} tokens",
        "record": f"`{RECORD}`, SHA-256 {record_hash}",
        "fingerprint": record.fingerprint,
        "commit": record.provenance.get("commit") or "unknown",
        "versions": ", ".join(f"{key} {value}" for key, value in record.provenance.get("versions", {}).items()),
    }
    parts = [_front_matter(data.licence), f"# {record.job.name}\n", _description(record), _table(facts), "## Recipe\n"]
    if isinstance(record.job, Ensemble):
        shares = record.job.member_weights or (1 / len(members),) * len(members)
        parts.append(
            _table({member.job.name: f"weight {share:g}" for member, share in zip(members, shares, strict=True)})
        )
    parts += [_table(flat_table(to_table(run))), "## Use\n", _usage(record)]
    return "\n".join(parts)


def _front_matter(licence: str) -> str:
    import yaml

    table = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": licence,
        "tags": ["epochal"],
    }
    return f"---\n{yaml.safe_dump(table, sort_keys=False, allow_unicode=True)}---\n"


def _description(record: Record) -> str:
    if isinstance(record.job, Ensemble):
        count = len(record.job.runs)
        if record.job.average == SOUP:
            return f"A language model with the mean parameters of {count} models. Trained with epochal.\n"
        how = {"logits": "raw logits", "probs": "probabilities"}[record.job.average]
        return f"An ensemble of {count} language models: the mean of their {how}. Trained with epochal.\n"
    return "A language model trained from scratch on finite text. Trained with epochal.\n"


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows, ""])


def _cell(value: Any) -> str:
    """Escape text for a cell of a Markdown table: HTML, column marks and line breaks."""
    return " ".join(html.escape(str(value), quote=False).replace("|", "&#124;").split())


def _usage(record: Record) -> str:
    code = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{loading_lines(record, "this folder")}
texts = [tokenizer.bos_token + text for text in ("A first text", "Another")]  # documents began with this token
batch = tokenizer(texts, return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=20)))
```
"""
    runs = (
        f"\n`trust_remote_code` runs `{CODE}` of this folder; members are the folders `member-*`.\n"
        if has_code(record)
        else ""
    )
    return f"{code}\nWith transformers 4.57 or later. Texts are padded on the left.\n{runs}"
