"""Adapters of models whose output head is their embedding, which PEFT holds as two."""

import numpy as np
import pytest
import safetensors.numpy
import transformers

from deepseek_jax.errors import UserError
from deepseek_jax.hf import adapter, reader
from deepseek_jax.hf import peft as files
from tests.support import adapters


def test_an_embedding_that_is_the_head_too(tmp_path):
    """PEFT would leave the head as it was."""
    import peft

    save = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    save |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**save))
    theirs.save_pretrained(tmp_path / "base")
    source, model, family = reader.open_source(str(tmp_path / "base"))
    source.close()
    config = adapters.adapted(model, r=4, modules_to_save="embed_tokens")
    embed = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    arrays = adapters.random_factors(config) | {"embed_tokens/weight": embed}
    (tmp_path / "adapter").mkdir()
    folder = str(tmp_path / "adapter")
    files.write(folder, adapter.of_run(arrays, config.lora, model, family), model)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    given = peft.PeftModel.from_pretrained(base, folder)
    out = [
        m.weight.detach().numpy()
        for m in (given.get_input_embeddings(), given.get_output_embeddings())
    ]
    assert all(np.array_equal(a, embed) for a in out)
    back = files.read(folder, model, family)
    assert back.lora.saved == ("embed_tokens",) and back.saved.keys() == {files.EMBEDDING}
    tensors = safetensors.numpy.load_file(f"{folder}/{files.WEIGHTS}")
    tensors.pop(files.PREFIX + files.HEAD)
    safetensors.numpy.save_file(tensors, f"{folder}/{files.WEIGHTS}")
    with pytest.raises(UserError, match="the adapter makes two weights of them"):
        files.read(folder, model, family)
