# rluf with its tested environment, for CPUs or CUDA, for one machine and for KubeRay:
#   docker build -t rluf .                                        # CPU
#   docker build --build-arg EXTRA=gpu -t rluf:gpu .              # CUDA 13: needs NVIDIA driver R580 or later on the host
#   docker run --rm --shm-size=4g -v rluf-runs:/runs rluf         # the quickstart, report in /runs/quickstart/latest
#   docker run --rm --user $(id -u):$(id -g) --shm-size=4g -v $PWD/runs:/runs rluf    # files that belong to you
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim-bookworm

# g++ and make for .ci/setup and for kernels that torch compiles at run time; git names the commit of a checkout that is
# mounted over /app; wget for KubeRay's probes; libnuma and libgomp for vLLM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libgomp1 libnuma1 make wget \
    && rm -rf /var/lib/apt/lists/*
# Other user ids (docker run --user, OpenShift) write cache, runs and Ray's token too; each owns what it writes.
RUN useradd --create-home --home-dir /var/lib/rluf --uid 1000 rluf && mkdir /app /cache /runs \
    && chown rluf /app /cache /runs && chmod 1777 /cache /runs /var/lib/rluf
USER rluf
WORKDIR /app

# The environment alone first: a change of rluf's code does not install it again.
ARG EXTRA=cpu
COPY --chown=rluf pyproject.toml Makefile README.md LICENSE ./
COPY --chown=rluf .ci .ci
COPY --chown=rluf constraints constraints
RUN mkdir rluf actors cluster && touch rluf/__init__.py actors/__init__.py cluster/__init__.py \
    && EXTRA=${EXTRA} make setup && rm -rf "$HOME/.cache"
COPY --chown=rluf . .

# NVIDIA's container runtime refuses to start the image on an older driver; ignored where there is no GPU.
# HOME and USER are also those of a user id that has no name in the image.
ENV PATH=/app/.venv/bin:$PATH \
    HOME=/var/lib/rluf \
    USER=rluf \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA=cuda>=13.0 \
    RAY_AUTH_MODE=token \
    RLUF_RUNS=/runs \
    RLUF_CACHE=/cache
CMD ["python", "-m", "rluf.train"]
