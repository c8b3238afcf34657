# Three images: `build` can run the line, `ci` runs its tests, `serve` (the last, hence the default) answers predictions
# and holds no torch. Build on the processor that will run it; 64-bit ARM works with the same file.
#
#   docker build -t temper-serve .
#   docker run --rm -p 8000:8000 -v "$PWD/runs/digits/bundle:/bundle:ro" temper-serve

FROM python:3.11-slim AS build
ENV ORT_DISABLE_TELEMETRY=1 PIP_NO_CACHE_DIR=1
WORKDIR /temper
RUN python -m venv /opt/temper
ENV PATH=/opt/temper/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pipeline pipeline
COPY stages stages
COPY targets targets
RUN pip install -c constraints.txt -e ".[build,cpu,rtx,serve]"
ENTRYPOINT ["python", "-m", "pipeline"]

FROM build AS ci
COPY Makefile Dockerfile CHANGELOG.md CONTRIBUTING.md ./
COPY docs docs
COPY tests tests
COPY benchmarks benchmarks
RUN pip install -c constraints.txt -e ".[build,cpu,rtx,serve,test]"
ENTRYPOINT ["python", "-m", "pytest"]

FROM python:3.11-slim AS wheels
COPY constraints.txt /
RUN python -m venv /opt/temper \
 && /opt/temper/bin/pip install --no-cache-dir -c /constraints.txt numpy onnxruntime fastapi uvicorn pillow

FROM python:3.11-slim AS serve
# Off before onnxruntime is first imported, wherever the import happens.
ENV ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PATH=/opt/temper/bin:$PATH
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin temper
COPY --from=wheels /opt/temper /opt/temper
WORKDIR /app
COPY pipeline/__init__.py pipeline/__main__.py pipeline/
COPY pipeline/cli/__init__.py pipeline/cli/_parser.py pipeline/cli/
COPY targets/__init__.py targets/
COPY targets/runtime targets/runtime
USER temper
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["python", "-m", "pipeline", "serve", "/bundle", "--host", "0.0.0.0"]
