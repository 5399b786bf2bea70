"""Models with random weights, trained here by cross-entropy: the small teacher, and a student from scratch.

The small teacher is a Llama of 3.1 M parameters, its BPE of 4096 entries trained on the quickstart's training text. Its
directory is like a run of the quickstart, with `teacher` and `data`, and `initial`, the untrained weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.huggingface import hf_config
from minitron_nemo.checkpoint import tokenizer as tokenizer_files
from minitron_nemo.checkpoint.files import replacing_directory, write_atomic
from minitron_nemo.checkpoint.transform import convert
from minitron_nemo.config import Recipe
from minitron_nemo.data.documents import read_documents
from minitron_nemo.data.prepare import prepare_data
from minitron_nemo.distillation.records import read_metrics
from minitron_nemo.distillation.train import train
from minitron_nemo.evaluation.heldout import HeldOut
from minitron_nemo.parallel.layout import Layout

SEPARATOR = "<|endoftext|>"
TEACHER = Architecture(
    num_layers=6,
    hidden_size=192,
    ffn_hidden_size=512,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=4096,
    max_position_embeddings=512,
    share_embeddings_and_output_weights=True,
)
CURVE = "curve.json"
CURVE_INTERVAL = 50  # updates


def make_teacher(base: Path, recipe: Recipe, architecture: Architecture = TEACHER) -> None:
    """Write `base`, of which what is there is not made again; the held-out losses on the way into `curve.json`."""
    if not (base / "initial").exists():
        write_tokenizer(base / "tokenizer", recipe)
        write_random(base / "initial", architecture, base / "tokenizer", seed=0)
    prepare_data(recipe.data, base / "initial" / "tokenizer", base / "data", progress=False)
    learn(recipe, base / "initial", base / "data", base / "teacher", base / CURVE)


def learn(recipe: Recipe, start: Path, data: Path, output: Path, curve: Path) -> None:
    """Train `start` without a teacher, unless `curve` is there: [[tokens, held-out loss], ...] on the way."""
    if curve.exists():
        return
    recipe.train.eval_interval = CURVE_INTERVAL
    training = output.with_name(output.name + ".training")
    outcome = train(
        recipe,
        student_dir=start,
        teacher_dir=start,  # cross-entropy alone asks it nothing
        prepared=data,
        work_dir=training,
        output_dir=output,
        run_dir=training,
        heldout=lambda: HeldOut.from_recipe(recipe, data, Layout()),
    )
    if outcome == "stopped":
        raise SystemExit(f"{output}: stopped; start again and it goes on")
    batch = recipe.train.global_batch_size * recipe.data.sequence_length
    records = [record for record in read_metrics(training / "metrics.jsonl") if "validation/loss" in record]
    points = [[record["iteration"] * batch, record["validation/loss"]] for record in records]
    write_atomic(curve, json.dumps(points))
    shutil.rmtree(training)


def write_tokenizer(directory: Path, recipe: Recipe) -> None:
    """Byte-level BPE of the training sources' documents; those that are held out by their hash are among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEACHER.vocab_size,
        special_tokens=[AddedToken(SEPARATOR, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(recipe), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR).save_pretrained(directory)


def texts(recipe: Recipe) -> Iterator[str]:
    for source in recipe.data.train:
        yield from (document.text for document in read_documents(source)[1] if document.text)


def write_random(directory: Path, architecture: Architecture, tokenizer: Path, seed: int) -> None:
    """A Megatron directory of the weights that transformers draws, with the files of `tokenizer`."""
    torch.manual_seed(seed)
    hugging_face = directory.with_name(directory.name + ".hf")
    with replacing_directory(hugging_face) as partial:
        config = AutoConfig.for_model(**hf_config(architecture, "float32"))
        AutoModelForCausalLM.from_config(config).save_pretrained(partial)
        tokenizer_files.copy_files(tokenizer, partial)
    convert(hugging_face, directory, "megatron", progress=False)
    shutil.rmtree(hugging_face)
