#!/usr/bin/env bash
# Trains RescaleViT's 20 runs on CIFAR-100; the same command again resumes.
#
# Usage: [WEIGHTS=DIR] bash scripts/train_cifar100.sh [FLAG]...
#
# WEIGHTS and flags: see scripts/study.sh.
set -euo pipefail

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/study.sh" cifar100 "$@"
