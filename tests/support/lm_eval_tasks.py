"""Tasks of lm-evaluation-harness on disk: choices, whole texts that need windows, and written answers."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

NUM_DOCUMENTS = 10
_COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
_TASKS = {
    "choice": """\
output_type: multiple_choice
num_fewshot: 1
fewshot_split: test
doc_to_text: "Which word is next after '{{{{before}}}}'? Answer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""",
    "written": """\
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{before}}}}"
generation_kwargs: {{until: ["e", "ro"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


def write_tasks(folder: Path) -> None:
    """Write the tasks and their data (each text some 500 tokens of the tests' tokenizer)."""
    folder.mkdir()
    data = folder / "documents.jsonl"
    lines = []
    for number, name in enumerate(sorted(topics)[:NUM_DOCUMENTS]):
        words = topics[name].split()
        options = [" " + words[20 + k + number % 3] for k in range(4)]
        lines.append(
            {"text": topics[name][:1200], "before": " ".join(words[:20]), "options": options, "answer": number % 4}
        )
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task, text in _TASKS.items():
        (folder / f"{task}.yaml").write_text(f"task: {task}\n" + (_COMMON + text).format(data=data))
