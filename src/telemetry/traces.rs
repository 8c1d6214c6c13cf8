//! Traces of runs for an OpenTelemetry collector, by OTLP over HTTP. Only in programs built with the feature `otel`.
//!
//! A trace is a run, with a span for each of its images; the lines of the log are events of them. Where it goes is said by the
//! variables of the OpenTelemetry specification, `OTEL_EXPORTER_OTLP_ENDPOINT` and the like; those beside it are read by the
//! libraries. The HTTP client is the
//! one that is in the program anyway, so that there is one TLS library.

use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tokio::runtime::Handle;
use tracing::Metadata;
use tracing_subscriber::{Layer as _, filter::filter_fn};

use super::logging::Further;

/// For a request to the collector. The default of the OpenTelemetry specification; what is late is lost, and nobody waits.
const TIMEOUT: Duration = Duration::from_secs(10);
/// An answer is read this far.
const MAX_ANSWER: usize = 64 << 10;
/// What is a span of a trace. Others, such as a look at an object in which nothing happens, are for the log alone.
const SPANS: [&str; 2] = ["run", "image"];

/// What sends traces, until it is told to end.
pub struct Traces(SdkTracerProvider);

/// Why no traces can be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The client could not be set up.
    #[error("traces cannot be sent: {0}")]
    Client(#[from] reqwest::Error),
    /// The URL, or one of the variables, is wrong.
    #[error("traces cannot be sent: {0}; see OTEL_EXPORTER_OTLP_ENDPOINT and the variables beside it")]
    Exporter(#[from] ExporterBuildError),
}

impl Traces {
    /// Sends traces to this URL from now on, with connections on this runtime; and what has to be told of spans for that.
    pub fn start(collector: &str, runtime: Handle) -> Result<(Self, Further), TracesError> {
        let http = reqwest::Client::builder().timeout(TIMEOUT).build()?;
        let exporter = SpanExporter::builder().with_http().with_endpoint(collector);
        let exporter = exporter.with_http_client(Sender { http, runtime }).build()?;
        let resource = Resource::builder().with_service_name(env!("CARGO_PKG_NAME")).build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer(env!("CARGO_PKG_NAME")));
        let layer = layer.with_location(false).with_threads(false).with_tracked_inactivity(false);
        let is_ours = |metadata: &Metadata<'_>| metadata.is_event() || SPANS.contains(&metadata.name());
        Ok((Self(provider), Some(layer.with_filter(filter_fn(is_ours)).boxed())))
    }

    /// Sends what has not been sent. Blocks, for as long as a request may take.
    pub fn end(self) {
        if let Err(error) = self.0.shutdown_with_timeout(TIMEOUT) {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Sends what the exporter's own thread hands it, on a runtime that has connections.
#[derive(Debug)]
struct Sender {
    http: reqwest::Client,
    runtime: Handle,
}

impl HttpClient for Sender {
    fn send_bytes<'a, 'b>(&'a self, request: Request<Bytes>) -> BoxFuture<'b, Result<Response<Bytes>, HttpError>>
    where
        'a: 'b,
        Self: 'b,
    {
        let http = self.http.clone();
        let sent = self.runtime.spawn(async move {
            let mut answer = http.execute(request.try_into()?).await?;
            let mut body = Vec::new();
            while let Some(chunk) = answer.chunk().await? {
                if body.len() + chunk.len() > MAX_ANSWER {
                    return Err("the collector's answer is too long".into());
                }
                body.extend_from_slice(&chunk);
            }
            let mut response = Response::new(Bytes::from(body));
            (*response.status_mut(), *response.headers_mut()) = (answer.status(), answer.headers().clone());
            Ok(response)
        });
        async move { sent.await? }.boxed()
    }
}
