"""How the output of a run is loaded by plain libraries: as text, for people."""

from pathlib import Path

from runfolder.files import list_names
from runfolder.record import read_record


def loading_lines(run_dir: Path) -> list[str]:
    """The lines of Python that load the output of a run; none while there is no output."""
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
    base = read_record(run_dir)["job"]["base"]
    arguments = repr(base["model"])
    if base["revision"]:
        arguments += f", revision={base['revision']!r}"
    if "config.json" in files:  # of a method that changes the base's config
        arguments += f", config=AutoConfig.from_pretrained({folder})"
    return [
        f"model = AutoModelForCausalLM.from_pretrained({arguments})",
        f"model = PeftModel.from_pretrained(model, {folder})",
    ]
