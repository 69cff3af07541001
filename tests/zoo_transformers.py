"""Hugging Face models from tiny random configurations, with labels in the batch.

Several of them compute in float32 whatever their type (the causal loss, RMS norms, rotary places,
T5's softmax), so that float64 gives them no more precision than float32: those come in float32
only. Their oracles run with such casts kept from happening, in true float64.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cases import Case, case, cross_entropy, stir

SINGLE = (torch.float32,)


class Undiminished(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(
            *args, **kwargs
        )


def by_logits(terms):
    """`full_loss` from the model's scores: `terms(batch, scores)` → scores and labels to compare.

    Attention runs as plain operations, and the mean runs over the labels of all batches.
    """

    def full_loss(model, batches):
        losses = []
        with sdpa_kernel([SDPBackend.MATH]), Undiminished():
            for batch in batches:
                scores, labels = terms(batch, model(**batch).logits)
                count = int((labels != -100).sum())
                losses.append((count, count * cross_entropy(scores, labels)))
        return sum(loss for _, loss in losses) / sum(count for count, _ in losses)

    return full_loss


def padded(tokens, lengths, end=True):
    """ids, attention_mask and labels, padded at the end or in front."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if end else slice(max(lengths) - length, None)
        ids[row, place] = torch.randint(1, tokens, (length,))
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def own_loss(model, batch):
    return model(**batch).loss


def causal_case(model, batches):
    """Each token predicts the next one, so that the first label of each row is not compared."""
    return Case(
        model=stir(model),
        batches=batches,
        batch_loss=own_loss,
        full_loss=by_logits(lambda batch, scores: (scores[:, :-1], batch["labels"][:, 1:])),
        weight=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
    )


@case("Hugging Face GPT-2", dtypes=SINGLE)
def gpt2(dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(105)
    config = GPT2Config(
        vocab_size=9,
        n_positions=6,
        n_embd=4,
        n_inner=6,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which it takes anyway, after a message that it does
    return causal_case(model, [padded(9, lengths) for lengths in ((6, 2, 4), (3, 5), (4,))])


@case("Hugging Face Llama", dtypes=SINGLE)
def llama(dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(114)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    batches = [padded(9, lengths, end=False) for lengths in ((5, 2), (3, 4, 6))]
    return causal_case(LlamaForCausalLM(config), batches)


@case("Hugging Face BERT classifier, BatchEncoding")
def bert_classifier(dtype):
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    torch.manual_seed(102)
    config = BertConfig(
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        num_labels=3,
    )
    batches = []
    for lengths in ((5, 2, 4), (3, 6), (1, 4, 2)):
        batch = padded(9, lengths)
        batches.append(BatchEncoding(batch | {"labels": torch.randint(3, (len(lengths),))}))
    return Case(
        model=stir(BertForSequenceClassification(config)),
        batches=batches,
        batch_loss=own_loss,
        full_loss=by_logits(lambda batch, scores: (scores, batch["labels"])),
    )


@case("Hugging Face ViT")
def vit(dtype):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(103)
    config = ViTConfig(
        image_size=4,
        patch_size=2,
        num_channels=1,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        num_labels=3,
    )
    batches = [
        {"pixel_values": torch.randn(n, 1, 4, 4), "labels": torch.randint(3, (n,))}
        for n in (4, 5, 2)
    ]
    return Case(
        model=stir(ViTForImageClassification(config)),
        batches=batches,
        batch_loss=own_loss,
        full_loss=by_logits(lambda batch, scores: (scores, batch["labels"])),
    )


@case("Hugging Face T5", dtypes=SINGLE)
def t5(dtype):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(105)
    config = T5Config(
        vocab_size=9,
        d_model=4,
        d_kv=2,
        d_ff=5,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    batches = []
    for lengths, answers in (((5, 2, 3), (2, 4, 1)), ((3, 4), (3, 2))):
        batches.append(padded(9, lengths) | {"labels": padded(9, answers)["labels"]})
    return Case(
        model=stir(T5ForConditionalGeneration(config)),
        batches=batches,
        batch_loss=own_loss,
        full_loss=by_logits(lambda batch, scores: (scores, batch["labels"])),
        weight=lambda batch: (batch["labels"] != -100).sum(),
    )
