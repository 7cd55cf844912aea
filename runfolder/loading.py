"""How the output of a run is loaded by plain libraries: as text, for people."""

from pathlib import Path

from runfolder.files import list_names
from runfolder.record import read_record


def loading_lines(run_dir: Path) -> list[str]:
    """The lines of Python that load the output of a run, or of what was fetched of one; none where there is none."""
    output = run_dir / "output"
    files = list_names(output)
    folder = repr(str(output))
    if "adapter_config.json" not in files:
        if "config.json" not in files:
            return []
        return [
            f"model = AutoModelForCausalLM.from_pretrained({folder})",
            f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        ]
    record = read_record(run_dir)
    base = record["job"]["base"]
    path = base["model"]
    before = (record.get("sent") or {}).get("base.model")
    if before and not Path(path).exists():  # this is not the cluster: here it is as it was before it was sent
        path = before
    arguments = repr(path)
    if base["revision"]:
        arguments += f", revision={base['revision']!r}"
    if "config.json" in files:  # of a method that changes the base's config
        arguments += f", config=AutoConfig.from_pretrained({folder})"
    return [
        f"model = AutoModelForCausalLM.from_pretrained({arguments})",
        f"model = PeftModel.from_pretrained(model, {folder})",
    ]
