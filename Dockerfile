# syntax=docker/dockerfile:1
# The same image as `make image`: one static binary, the public certificate roots, a name for uid 65532. No shell.

FROM rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    make release \
 && triple=$(rustc -vV | sed -n 's/^host: //p') \
 && mkdir -p /image/etc/ssl/certs \
 && install -m 0755 "target/$triple/release/imagemirror" /image/imagemirror \
 && install -m 0644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
 && echo 'imagemirror:x:65532:65532:imagemirror:/:/nonexistent' > /image/etc/passwd \
 && echo 'imagemirror:x:65532:' > /image/etc/group

FROM scratch
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="imagemirror" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image/ /
# What is freed in one arena of the C library is of no use to another: with several, peaks take a third more memory.
ENV MALLOC_ARENA_MAX=1
WORKDIR /
USER 65532
ENTRYPOINT ["/imagemirror"]
