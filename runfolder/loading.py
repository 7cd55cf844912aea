"""How the output of a run is loaded by plain libraries: as text, for people."""

from pathlib import Path

from runfolder.files import list_names
from runfolder.record import read_record

_SCORING = "reward"  # the objective whose models give texts a score


def loading_lines(run_dir: Path) -> list[str]:
    """The lines of Python that load the output of a run, or of what was fetched of one; none where there is none."""
    output = run_dir / "output"
    files = list_names(output)
    folder = repr(str(output))
    is_adapter = "adapter_config.json" in files
    if not is_adapter and "config.json" not in files:
        return []
    record = read_record(run_dir)
    model_class = "AutoModelForCausalLM"
    if record["job"].get("objective", {}).get("kind") == _SCORING:
        model_class = "AutoModelForSequenceClassification"
    if not is_adapter:
        return [
            f"model = {model_class}.from_pretrained({folder})",
            f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        ]
    base = record["job"]["base"]
    path = base["model"]
    before = (record.get("sent") or {}).get("base.model")
    if before and not Path(path).exists():  # this is not the cluster: here it is as it was before it was sent
        path = before
    arguments = repr(path)
    if base["revision"]:
        arguments += f", revision={base['revision']!r}"
    if "config.json" in files:  # of a method or an objective that changes the base's config
        arguments += f", config=AutoConfig.from_pretrained({folder})"
    return [
        f"model = {model_class}.from_pretrained({arguments})",
        f"model = PeftModel.from_pretrained(model, {folder})",
    ]
