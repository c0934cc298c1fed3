from __future__ import annotations

from pathlib import Path

import pytest

from dsft.config.load import config_to_json, load_config
from dsft.config.remote_path import HubDataset, check_store_path, parse_hub_path
from dsft.errors import ConfigError
from tests.support.run_yaml import write_run_yaml

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"https://user:{SECRET}@host/a.jsonl", "must not hold a user, a password or a query"),
        (f"s3://{SECRET}@bucket/a.jsonl", "must not hold a user"),
        (f"https://host/a.jsonl?X-Amz-Signature={SECRET}", "must not hold a user"),
        (f"hub://user:{SECRET}@o/n", "is named hub://OWNER/NAME@COMMIT/CONFIG/SPLIT"),
        ("hub://o/n@main/default/train[:10%]", "without globs or slices"),
        (f"ftp://user:{SECRET}@host/a.jsonl", "there is no scheme ftp://"),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_secret_in_a_url_is_refused_and_not_repeated(path: str, message: str, as_list: bool, tmp_path: Path) -> None:
    file = write_run_yaml(tmp_path)
    text = file.read_text()
    assert "path: [a.jsonl, b.jsonl]" in text
    file.write_text(text.replace("path: [a.jsonl, b.jsonl]", f'path: ["{path}"]' if as_list else f'path: "{path}"'))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "line 10: data.sources.1.path" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_urls_without_secrets_are_paths(tmp_path: Path) -> None:
    file = write_run_yaml(tmp_path)
    urls = [
        "s3://bucket/a?/*.jsonl",
        "gs://b/a.jsonl",
        "hf://datasets/o/n@main/*.parquet",
        "hub://o/n",
        "https://h/a.jsonl",
    ]
    file.write_text(file.read_text().replace("[a.jsonl, b.jsonl]", str(urls)))
    assert config_to_json(load_config(file))["data"]["sources"][1]["path"] == urls


def test_the_name_of_a_dataset_of_the_hub() -> None:
    for path in ("hub://o/n", "hub://o/n@main", "hub://o/n/en", "hub://o/n@a1/en/train"):
        assert str(parse_hub_path(path)) == path
    assert parse_hub_path("hub://o/n-1.x@a1/20231101.en/train.de") == HubDataset(
        "o/n-1.x", "a1", "20231101.en", "train.de"
    )


def test_a_dataset_is_no_place_for_a_store() -> None:
    with pytest.raises(ValueError, match="a store has files, which hub:// does not name"):
        check_store_path("hub://o/n@main/default/train")
