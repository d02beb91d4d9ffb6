"""
convert.py: out of here, and back                                                          (ours)

THE IDEA    A model is of use to others in files that their programs read. safetensors holds any
            model.pt: named tensors, and beside them as text what is no tensor. And what reads words
            here is a plain Llama: its weights have other names in transformers, and that is all.
A PICTURE   model.pt  <-->  model.safetensors       everything, weights to the bit
            model.pt   -->  a folder                what reads and writes words, for transformers:
                                                    config.json, model.safetensors, tokenizer.json
THE RULE    here                                    in transformers
              embedding, norm, head                   model.embed_tokens, model.norm, lm_head
              blocks.3.norm1, .norm2                  model.layers.3.input_layernorm,
                                                      .post_attention_layernorm
              blocks.3.qkv, .out                      .self_attn.{q,k,v}_proj, .o_proj
              blocks.3.gate_up, .down                 .mlp.{gate,up}_proj, .down_proj
PAPER/HERE  same: "the standard settings from Llama" (§4.1), so transformers' Llama gives the same
            logits (a test). Pictures do not travel to it: it has neither patches nor the mask.
READ NEXT   checkpoint.py
TRY IT      python -m support.convert assets/scenes.pt scenes.safetensors
TEST        tests/test_convert.py
"""
import base64
import json
from pathlib import Path

from data import BOS, EOS, PAD, SPECIAL, Words
from support import checkpoint
from support.common import (
    Parser,
    UserError,
    check_ordinary,
    check_writable,
    run_command,
    whole_file,
    write_json,
)


def need_safetensors():
    """The library's module for torch. Raises UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("this needs safetensors: pip install safetensors==0.8.0") from None
    return safetensors.torch


# ----------------------------------------------------------------------------------- safetensors
def to_safetensors(path, out):
    """Write a model.pt as a .safetensors."""
    content = checkpoint.load(path, "model")
    tensors = {}
    for name, tensor in content.pop("weights").items():
        tensors[f"model.{name}"] = tensor.contiguous()
    for name, tensor in content["vae"].pop("weights").items():
        tensors[f"vae.{name}"] = tensor.contiguous()
    if isinstance(content["words"], bytes):             # a SentencePiece model; JSON has no bytes
        content["words"] = {"base64": base64.b64encode(content["words"]).decode()}
    write_tensors(out, tensors, {"transfusion": json.dumps(content)})


def from_safetensors(path, out):
    """Write what `to_safetensors` made as a model.pt. Raises UserError if it is something else."""
    library = need_safetensors()
    try:
        check_ordinary(path)                            # a pipe would wait for ever
        tensors = library.load_file(path)
        with library.safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["transfusion"])
        content["weights"] = {}
        content["vae"]["weights"] = {}
        for name, tensor in tensors.items():
            part, name = name.split(".", 1)
            weights = content["weights"] if part == "model" else content["vae"]["weights"]
            weights[name] = tensor
        if isinstance(content["words"], dict):
            content["words"] = base64.b64decode(content["words"]["base64"])
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as problem:                        # the library's errors have no common class
        raise UserError(f"{path} is no model of this program ({type(problem).__name__}): was it "
                        f"made by python -m support.convert?") from None
    checkpoint.save(out, content)


def write_tensors(path, tensors, about):
    """Write a .safetensors, whole or not at all. about: {name: text}, its metadata."""
    content = need_safetensors().save(tensors, about)
    with whole_file(path) as file:
        file.write(content)


# ------------------------------------------------------------------------- a Llama for transformers
def to_llama(path, folder):
    """Write what reads and writes words in a model.pt as a folder that transformers loads:
    LlamaForCausalLM.from_pretrained(folder). Raises UserError for Chameleon's blocks."""
    content = checkpoint.load(path, "model")
    trained = checkpoint.load_trained(path)             # checks that all fits together
    config = trained.model.config
    if config.stable:
        raise UserError(f"{path} has Chameleon's blocks, with norms where a Llama has none: "
                        f"transformers' Llama cannot hold it")
    weights = {checkpoint.new_name(name): w for name, w in content["weights"].items()}
    tensors = llama_tensors(weights, config.layers)
    folder = Path(folder)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", llama_config(config, weights))
    if isinstance(trained.tokenizer, Words):            # a .model of SentencePiece has other ids
        write_json(folder / "tokenizer.json", words_as_tokenizer(trained.tokenizer))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[BOS],
            "eos_token": SPECIAL[EOS], "pad_token": SPECIAL[PAD]})


def llama_tensors(weights, layers):
    """{transformers' name: tensor} of our {name: tensor}. See THE RULE."""
    tensors = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    for k in range(layers):
        here = f"blocks.{k}."
        there = f"model.layers.{k}."
        q, key, v = weights[here + "qkv.weight"].chunk(3)
        gate, up = weights[here + "gate_up.weight"].chunk(2)
        tensors |= {
            there + "input_layernorm.weight": weights[here + "norm1.weight"],
            there + "self_attn.q_proj.weight": q,
            there + "self_attn.k_proj.weight": key,
            there + "self_attn.v_proj.weight": v,
            there + "self_attn.o_proj.weight": weights[here + "out.weight"],
            there + "post_attention_layernorm.weight": weights[here + "norm2.weight"],
            there + "mlp.gate_proj.weight": gate,
            there + "mlp.up_proj.weight": up,
            there + "mlp.down_proj.weight": weights[here + "down.weight"],
        }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def llama_config(config, weights):
    """transformers' config.json of a model.ModelConfig."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": weights["blocks.0.down.weight"].shape[1],
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,                           # model.Block's
        "rope_theta": 10000.0,                          # model.rope_tables'
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": str(weights["head.weight"].dtype).removeprefix("torch."),
    }


def words_as_tokenizer(words):
    """tokenizer.json, as the tokenizers library reads it, of a data.Words: lower case, whole words,
    <bos> in front. A word that is not known becomes <pad>, where ours raises an error."""
    special = []
    for k, name in enumerate(SPECIAL):
        special.append({"id": k, "content": name, "special": True, "single_word": False,
                        "lstrip": False, "rstrip": False, "normalized": False})
    first = {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    known = {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": [first, text],
                           "pair": [first, text], "special_tokens": {SPECIAL[BOS]: known}},
        "model": {"type": "WordLevel", "vocab": words.ids, "unk_token": SPECIAL[PAD]},
    }


# ------------------------------------------------------------------------------------ command line
def main(argv=None):
    """Convert as the names of the two files say."""
    parser = Parser(
        prog="python -m support.convert",
        description="model.pt to .safetensors and back; or its Llama to a folder for transformers.")
    parser.add_argument("source", help="a model.pt, or a .safetensors that was made of one")
    parser.add_argument("out", help="x.safetensors; x.pt; or any other name: a folder")
    args = parser.parse_args(argv)
    need_safetensors()
    kinds = (Path(args.source).suffix, Path(args.out).suffix)
    if kinds[1]:
        check_writable(args.out)
    if kinds == (".pt", ".safetensors"):
        to_safetensors(args.source, args.out)
    elif kinds == (".safetensors", ".pt"):
        from_safetensors(args.source, args.out)
    elif kinds == (".pt", ""):
        to_llama(args.source, args.out)
    else:
        raise UserError(f"from {args.source} to {args.out} there is no way: give model.pt and "
                        f"x.safetensors, x.safetensors and x.pt, or model.pt and a folder")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
