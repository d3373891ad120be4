# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from benchmarks import report, unet
from benchmarks.unet_stacks import Job, stacks

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    out = folder / "unet_tiny.json"
    arguments = ["--model", "tiny", "--peers", "torch", "--specs", "w8a8,no-such-spec"]
    arguments += ["--stacks", "torch-fp32,zo-*", "--rounds", "2", "--threads", "1", "--profile"]
    arguments += ["--batch", "2", "--lock", str(folder / "lock")]
    code = unet.main([*arguments, "--cache", str(folder / "cache"), "--out", str(out)])
    return code, folder, json.loads(out.read_text())


def test_rows(measured):
    code, folder, content = measured
    (group,) = content["groups"]
    assert group["title"] == "a tiny UNet, batch 2"
    reference, ours, bad = group["rows"]
    for row in (reference, ours):
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert 2**27 < row["peak"] < 2**32
        assert row["failed"] == ""
    assert reference["error"] == 0
    assert 0 < ours["error"] < 0.2
    assert code == 1
    assert "no-such-spec" in bad["failed"]
    kinds = {row["kind"] for row in content["profiles"]["a tiny UNet, batch 2, zo-w8a8"]}
    assert {"Linear", "Conv2d"} <= kinds
    assert not list((folder / "cache").glob("tmp*"))  # outputs and logs


def test_tables(measured):
    _, folder, content = measured
    text = report.section(folder / "unet_tiny.json")
    assert content["command"] in text
    assert "| zo_kernels w8a8 |" in text
    assert "Where the time goes: a tiny UNet, batch 2, torch-fp32" in text


def test_stacks():
    names = [s.name for s in stacks(["torch", "quanto", "openvino"], ["w8a8", "w4a8-g64@bf16"])]
    assert names == [
        *("torch-fp32", "torch-bf16", "quanto-int8-fp32", "quanto-int8-bf16", "quanto-int4-fp32"),
        *("quanto-int4-bf16", "openvino-fp32", "openvino-int8", "zo-w8a8", "zo-w4a8-g64@bf16"),
    ]


def test_a_conversion_is_kept_apart_for_what_changes_it(tmp_path):
    job = Job("zo-w8@bf16", "tiny", 1, tmp_path)
    assert job.folder("a") != job.folder("b")
    assert job.folder() != Job("zo-w8@bf16", "tiny", 1, tmp_path, seed=1).folder()
    assert job.folder() == Job("zo-w8@bf16", "tiny", 3, tmp_path).folder()
    assert "@" not in str(job.folder().name)


@pytest.mark.parametrize(
    "arguments", [["--peers", "tensorrt"], ["--rounds", "0"], ["--batch", "0"], ["--model", "x"]]
)
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit):
        unet.main(arguments)
