# Serves a model: OpenAI's API with reward weights, and the page.
#   docker build -t genarm .                              without a GPU
#   docker build -t genarm --build-arg TORCH=cuda .       with one; then `docker run --gpus all …`
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/bundle:/model:ro" genarm
# What is mounted must hold its members: genarm compose --from guided --bundle --output bundle
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH=cpu
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/install-server scripts/
COPY src src
RUN PYTHON=python3 scripts/install-server "$TORCH" --no-cache-dir && useradd --create-home genarm

USER genarm
WORKDIR /home/genarm
EXPOSE 8000
HEALTHCHECK --start-period=5m \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["genarm", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
