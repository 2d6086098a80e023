# swaa for TPU VMs, GKE and XPK, from the committed lock. In the repository's root:
#
#   docker build -f docker/tpu-vm.Dockerfile -t swaa-jax:tpu .
#   docker run --rm --privileged --net=host -v ~/.cache:/root/.cache swaa-jax:tpu doctor
#
# --privileged lets it open the chips, --net=host lets the hosts of a slice meet, and the cache keeps
# compiled programs and the hub's files.

# glibc 2.36: libtpu's wheel asks for 2.31. 3.11 is the Python of the lock.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

WORKDIR /opt/swaa-jax

# Apart from the source, so that a change of that installs nothing again.
COPY requirements/lock-py311-tpu.txt requirements/
RUN pip install --require-hashes -r requirements/lock-py311-tpu.txt

COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY kernels_pallas kernels_pallas
COPY swaa_jax swaa_jax
RUN pip install --no-deps --no-build-isolation . && pip check && swaa --version

WORKDIR /work
ENTRYPOINT ["swaa"]
CMD ["doctor"]
