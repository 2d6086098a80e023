# swaa for NVIDIA GPUs, from the committed lock. In the repository's root:
#
#   docker build -f docker/cuda.Dockerfile -t swaa-jax:cuda .
#   docker run --rm --gpus all -v ~/.cache:/root/.cache swaa-jax:cuda doctor
#
# CUDA's libraries are wheels of the lock; the host brings the driver (525 or newer, for CUDA 12) and
# NVIDIA's container toolkit.

FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/swaa-jax

# Apart from the source, so that a change of that installs nothing again.
COPY requirements/lock-py311-cuda.txt requirements/
RUN pip install --require-hashes -r requirements/lock-py311-cuda.txt

COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY kernels_pallas kernels_pallas
COPY swaa_jax swaa_jax
RUN pip install --no-deps --no-build-isolation . && pip check && swaa --version

WORKDIR /work
ENTRYPOINT ["swaa"]
CMD ["doctor"]
