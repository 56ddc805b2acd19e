"""The mathematics and the networks: noise schedule, prediction types, solvers, guidance, conditioning, teachers, LoRA, sampling."""

from infra.torchvision_ops import define_missing_ops

define_missing_ops()  # before anything here imports diffusers, transformers or peft, which import torchvision
