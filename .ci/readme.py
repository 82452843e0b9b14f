"""Write README.md from nbs/index.ipynb: its cells as Markdown, with links that hold from the root of the project."""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def markdown(cell):
    "A cell as Markdown; a code cell with what it printed."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source.replace("](images/", "](nbs/images/")
    shown = ["".join(output["data"]["text/plain"] if "data" in output else output["text"]) for output in cell["outputs"]]
    return "\n\n".join([f"```python\n{source}\n```", *(f"```\n{text.rstrip()}\n```" for text in shown)])


cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
(ROOT / "README.md").write_text("\n\n".join(map(markdown, cells)) + "\n", encoding="utf-8")
