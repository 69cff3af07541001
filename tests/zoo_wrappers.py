"""What is put around a model: checkpointing, torch.compile, parallel wrappers, types of its own."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from cases import Case, case, cross_entropy, cut, joined, mean_cross_entropy, settle_batch_norm


def small_net():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)
    )
    settle_batch_norm(model, torch.randn(30, 4))
    return model


def classifier_case(model, **options):
    x, y = torch.randn(14, 4), torch.randint(3, (14,))
    return Case(
        model=model,
        batches=cut((x, y), (4, 7, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        **{"full_loss": mean_cross_entropy, **options},
    )


# --------------------------------------------------------------------------------- checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


def without_checkpoint(m, batches):
    x = torch.tanh(m.first(joined(batches, 0)))
    return cross_entropy(m.head(m.block(x)), joined(batches, 1))


@case("Activation checkpointing")
def checkpointed(dtype):
    torch.manual_seed(140)
    return classifier_case(Checkpointed(reentrant=False), full_loss=without_checkpoint)


@case("Activation checkpointing, reentrant", approximate="checkpoint")
def checkpointed_reentrant(dtype):
    torch.manual_seed(141)
    return classifier_case(Checkpointed(reentrant=True), full_loss=without_checkpoint)


# -------------------------------------------------------------------------------------- wrappers


def alone(model):
    """DDP over a group of one process, which needs no port and is gone at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()

    def own_gradient(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, own_gradient)
    return wrapped


def compiled(model):
    return torch.compile(model, backend="eager")


def wrapped_case(seed, wrap):
    torch.manual_seed(seed)
    model = small_net()
    return classifier_case(wrap(model), inner=model)


@case("torch.compile")
def compiled_module(dtype):
    return wrapped_case(142, compiled)


@case("DataParallel")
def data_parallel(dtype):
    return wrapped_case(143, nn.DataParallel)


@case("DistributedDataParallel")
def distributed(dtype):
    return wrapped_case(144, alone)


@case("torch.compile around DistributedDataParallel")
def compiled_distributed(dtype):
    return wrapped_case(145, lambda model: compiled(alone(model)))


@case("module.compile(), in place")
def compiled_in_place(dtype):
    torch.manual_seed(149)
    model = small_net()
    model.compile(backend="eager")
    return classifier_case(model)


@case("A compiled module inside a model")
def compiled_inside(dtype):
    torch.manual_seed(150)
    model = small_net()
    model[0] = compiled(nn.Sequential(model[0], nn.Tanh()))

    def full_loss(m, batches):
        x = torch.tanh(m[0]._orig_mod[0](joined(batches, 0)))
        return cross_entropy(m[1:](x), joined(batches, 1))

    return classifier_case(model, full_loss=full_loss)


# ----------------------------------------------------------------------------------------- types


@case("bfloat16 model", dtypes=(torch.bfloat16,), fixed_dtype=True)
def bfloat16_model(dtype):
    torch.manual_seed(146)
    made = classifier_case(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16())
    made.batches = [(x.bfloat16(), y) for x, y in made.batches]
    return made


class TwoTypes(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).to(body)
        self.head = nn.Linear(5, 3).to(head)

    def forward(self, x):
        features = self.body(x.to(self.body[0].weight.dtype))
        return self.head(features.to(self.head.weight.dtype))


@case("float32 body, float64 head", dtypes=(torch.float32,), fixed_dtype=True)
def mixed_dtypes(dtype):
    torch.manual_seed(147)
    return classifier_case(TwoTypes(torch.float32, torch.float64))


@case("bfloat16 body, float32 head", dtypes=(torch.bfloat16,), fixed_dtype=True)
def bfloat16_body(dtype):
    torch.manual_seed(148)
    return classifier_case(TwoTypes(torch.bfloat16, torch.float32))
