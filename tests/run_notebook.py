"""Runs a notebook in a directory, in a process of its own, and prints what its cells print: `run_notebook.py NOTEBOOK DIRECTORY`."""

import sys

import nbclient
import nbformat


def main(path: str, directory: str) -> None:
    """Run the notebook; ends with the outputs of its cells as a message where one fails."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.source.startswith("%pip"):
            cell.source = ""  # what it installs is what is tested
    nbclient.NotebookClient(
        notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": directory}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", output.get("evalue", "")) for output in outputs)
    # `!` does not stop where a command fails.
    if "error:" in printed or any(output.output_type == "error" for output in outputs):
        sys.exit(printed)
    print(printed)


if __name__ == "__main__":
    main(*sys.argv[1:])
