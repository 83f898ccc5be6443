#!/usr/bin/env bash
# Trains RescaleViT's 20 runs on CIFAR-10; the same command again resumes.
#
# Usage: [WEIGHTS=DIR] bash scripts/train_cifar10.sh [FLAG]...
#
# WEIGHTS and flags: see scripts/study.sh.
set -euo pipefail

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/study.sh" cifar10 "$@"
