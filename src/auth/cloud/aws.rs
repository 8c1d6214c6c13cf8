//! Amazon Elastic Container Registry: an access key, or a role that an identity takes on, is exchanged for a password of
//! twelve hours (docs.aws.amazon.com, "Private registry authentication in Amazon ECR").
//!
//! Amazon's crates sign requests and read answers; they are sent by our own [`Http`], so that proxies, certificates and closed
//! networks hold for them, too.

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use aws_config::{BehaviorVersion, Region};
use aws_credential_types::{
    Credentials,
    provider::{SharedCredentialsProvider, error::CredentialsError},
};
use aws_sdk_ecr::types::{ImageScanningConfiguration, ImageTagMutability, Tag};
use aws_smithy_runtime_api::client::{
    http::{
        HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
    },
    orchestrator::{HttpRequest, HttpResponse},
    result::{ConnectorError, SdkError},
    runtime_components::RuntimeComponents,
};
use aws_smithy_types::{DateTime, body::SdkBody, error::metadata::ProvideErrorMetadata, retry::RetryConfig};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};

use super::{Account, Cloud, EcrHost, Principal, acr::Claims};
use crate::{
    auth::{Credential, Exchange, ExchangeError, Http, Issued, NewRepository, ToMetadata, Unusable},
    oci::{Host, RepositoryName},
    reason::Reason,
};

/// The role that a `ServiceAccount` takes on (docs.aws.amazon.com, "IAM roles for service accounts").
const ROLE_ARN: &str = "eks.amazonaws.com/role-arn";
/// Whom its token is for, where that is not [`AUDIENCE`].
const AUDIENCE_ANNOTATION: &str = "eks.amazonaws.com/audience";
const AUDIENCE: &str = "sts.amazonaws.com";
/// Where the public registry has its one API.
const PUBLIC_REGION: &str = "us-east-1";
/// What the policy of whoever logs in has to allow.
const TO_LOG_IN: &str = "ecr:GetAuthorizationToken on *";
const TO_LOG_IN_PUBLICLY: &str = "ecr-public:GetAuthorizationToken and sts:GetServiceBearerToken on *";
const TO_CREATE: &str = "ecr:CreateRepository, and with tags ecr:TagResource,";
/// How long passwords are good for.
const LIFE: Duration = Duration::from_hours(12);

/// Whether it is the name of a long-term access key (docs.aws.amazon.com, "IAM identifiers").
pub(super) fn is_access_key(name: &str) -> bool {
    name.len() >= 16 && name.starts_with("AKIA") && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// The login of an access key and its secret.
pub(super) fn key_pair(host: &Host, written: &Arc<Credential>) -> Arc<Credential> {
    let Some(ecr) = EcrHost::of(host) else { return Arc::clone(written) };
    let (key, secret) = (written.username().to_owned(), written.password().clone());
    let who = Who::KeyPair { key, secret };
    let login = EcrLogin { ecr, who, origin: written.origin().to_owned() };
    Arc::new(written.exchanged_by(Arc::new(login)))
}

/// The login of an identity.
pub(super) fn login(host: &Host, principal: &Principal) -> Result<Credential, Unusable> {
    let ecr = EcrHost::of(host)
        .ok_or_else(|| Unusable { reason: Reason::InvalidSpec, message: format!("{host} is no registry of Amazon") })?;
    let (who, name, origin) = match principal {
        Principal::Program => (Who::Program, Cloud::Aws.to_string(), principal.origin()),
        Principal::Account(account) => {
            let role = account.annotation(ROLE_ARN)?.to_owned();
            let audience = account.annotations.get(AUDIENCE_ANNOTATION).filter(|audience| !audience.is_empty());
            let audience = audience.map_or(AUDIENCE, String::as_str).to_owned();
            // Quoted, so that no two principals have one name.
            let name = format!("{} {:?} {:?} {role:?} {audience:?}", Cloud::Aws, account.namespace, account.name);
            let origin = format!("{} as {role}", principal.origin());
            (Who::Account { account: account.clone(), role, audience }, name, origin)
        }
    };
    let login = EcrLogin { ecr, who, origin: origin.clone() };
    Ok(Credential::exchanged(Arc::new(login), &name, &origin))
}

/// Somebody who gets passwords for a registry.
struct EcrLogin {
    ecr: EcrHost,
    who: Who,
    origin: String,
}

enum Who {
    KeyPair { key: String, secret: SecretString },
    Account { account: Account, role: String, audience: String },
    Program,
}

impl EcrLogin {
    fn region(&self) -> Region {
        Region::new(match &self.ecr {
            EcrHost::Private { region, .. } => region.clone(),
            EcrHost::Public => PUBLIC_REGION.to_owned(),
        })
    }

    async fn password(&self, http: Arc<dyn Http>) -> Result<Issued, ExchangeError> {
        let (token, end) = match &self.ecr {
            EcrHost::Private { .. } => {
                let answer = self.ecr_client(&http).await?.get_authorization_token().send().await;
                let data = answer.map_err(|error| of_ecr(error, TO_LOG_IN))?.authorization_data.unwrap_or_default();
                data.into_iter().next().map(|data| (data.authorization_token, data.expires_at))
            }
            EcrHost::Public => {
                let (credentials, bridge) = (self.credentials(&http).await?, Bridge::over(&http));
                let config = aws_sdk_ecrpublic::Config::builder()
                    .behavior_version(BehaviorVersion::v2026_01_12())
                    .region(self.region())
                    .retry_config(RetryConfig::disabled())
                    .http_client(bridge)
                    .credentials_provider(credentials)
                    .build();
                let client = aws_sdk_ecrpublic::Client::from_conf(config);
                let answer = client.get_authorization_token().send().await;
                let data = answer.map_err(|error| of_ecr(error, TO_LOG_IN_PUBLICLY))?.authorization_data;
                data.map(|data| (data.authorization_token, data.expires_at))
            }
        }
        .unwrap_or_default();
        let token = token.ok_or_else(|| malformed("there is no token in the answer"))?;
        let pair = STANDARD.decode(&token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = pair.ok_or_else(|| malformed("the token is not base64"))?;
        let (name, password) =
            pair.split_once(':').ok_or_else(|| malformed("the token is not a name and a password"))?;
        let credential = Credential::new(name.to_owned(), password.to_owned().into(), &self.origin);
        Ok(Issued { credential: Arc::new(credential), life: life(end) })
    }

    async fn create(
        &self,
        http: Arc<dyn Http>,
        name: &RepositoryName,
        settings: &NewRepository,
    ) -> Result<(), ExchangeError> {
        if self.ecr == EcrHost::Public {
            let message = "repositories of the public registry are not created; create it there".to_owned();
            return Err(Unusable { reason: Reason::RepositoryMissing, message }.into());
        }
        let tag = |(key, value): (&String, &String)| {
            let built = Tag::builder().key(key).value(value).build();
            built.map_err(|error| malformed(&error.to_string()))
        };
        let mutability =
            if settings.immutable_tags { ImageTagMutability::Immutable } else { ImageTagMutability::Mutable };
        let scanning = ImageScanningConfiguration::builder().scan_on_push(settings.scan_on_push).build();
        let client = self.ecr_client(&http).await?;
        let mut request = client.create_repository().repository_name(name.as_str());
        for found in settings.tags.iter().map(tag) {
            request = request.tags(found?);
        }
        let answer = request.image_tag_mutability(mutability).image_scanning_configuration(scanning).send().await;
        match answer {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("RepositoryAlreadyExistsException") => Ok(()),
            Err(error) => Err(of_ecr(error, TO_CREATE)),
        }
    }

    async fn ecr_client(&self, http: &Arc<dyn Http>) -> Result<aws_sdk_ecr::Client, ExchangeError> {
        let fips = matches!(self.ecr, EcrHost::Private { fips: true, .. });
        let config = aws_sdk_ecr::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(self.region())
            .use_fips(fips)
            // What fails is repeated by who asks.
            .retry_config(RetryConfig::disabled())
            .http_client(Bridge::over(http))
            .credentials_provider(self.credentials(http).await?)
            .build();
        Ok(aws_sdk_ecr::Client::from_conf(config))
    }

    /// What requests to the registry's API are signed with.
    async fn credentials(&self, http: &Arc<dyn Http>) -> Result<SharedCredentialsProvider, ExchangeError> {
        match &self.who {
            Who::KeyPair { key, secret } => {
                let pair = Credentials::new(key, secret.expose_secret(), None, None, "imagemirror");
                Ok(SharedCredentialsProvider::new(pair))
            }
            Who::Account { account, role, audience } => self.assume(account, role, audience, http).await,
            Who::Program => {
                let config = aws_config::defaults(BehaviorVersion::v2026_01_12())
                    .region(self.region())
                    .retry_config(RetryConfig::disabled())
                    .http_client(Bridge { http: Arc::clone(http), as_the_program: true })
                    .load()
                    .await;
                config.credentials_provider().ok_or_else(no_identity)
            }
        }
    }

    /// Takes on the role (docs.aws.amazon.com, AWS Security Token Service, `AssumeRoleWithWebIdentity`).
    async fn assume(
        &self,
        account: &Account,
        role: &str,
        audience: &str,
        http: &Arc<dyn Http>,
    ) -> Result<SharedCredentialsProvider, ExchangeError> {
        let token = account.identity.token(audience).await?;
        let config = aws_sdk_sts::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(self.region())
            .retry_config(RetryConfig::disabled())
            .http_client(Bridge::over(http))
            .build();
        let answer = aws_sdk_sts::Client::from_conf(config)
            .assume_role_with_web_identity()
            .role_arn(role)
            .role_session_name(session_name(account))
            .web_identity_token(token.expose_secret())
            .send()
            .await
            .map_err(|error| explain(failed("STS", error, &[&token]), account, role, audience, &token))?;
        let given = answer.credentials.ok_or_else(|| malformed("STS gave no credentials"))?;
        let credentials = Credentials::new(
            given.access_key_id,
            given.secret_access_key,
            Some(given.session_token),
            None,
            "imagemirror",
        );
        Ok(SharedCredentialsProvider::new(credentials))
    }
}

impl Exchange for EcrLogin {
    fn exchange(&self, http: Arc<dyn Http>) -> BoxFuture<'_, Result<Issued, ExchangeError>> {
        Box::pin(self.password(http))
    }

    fn advice(&self) -> Option<&'static str> {
        let advice = "allow in the policy of this identity's role, and in the repository's, ecr:BatchGetImage and \
                      ecr:GetDownloadUrlForLayer to read; to write also ecr:BatchCheckLayerAvailability, \
                      ecr:InitiateLayerUpload, ecr:UploadLayerPart, ecr:CompleteLayerUpload and ecr:PutImage";
        // What is wrong with a key is wrong with its Secret.
        (!matches!(self.who, Who::KeyPair { .. })).then_some(advice)
    }

    fn create_repository<'a>(
        &'a self,
        http: Arc<dyn Http>,
        name: &'a RepositoryName,
        settings: &'a NewRepository,
    ) -> BoxFuture<'a, Result<(), ExchangeError>> {
        Box::pin(self.create(http, name, settings))
    }
}

impl fmt::Debug for EcrLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EcrLogin({:?} of {}, [redacted])", self.ecr, self.origin)
    }
}

/// What is left until then. Where our clock cannot be right, as long as Amazon always gives: what it refuses is had again.
fn life(end: Option<DateTime>) -> Duration {
    let left = end.map(|end| end.secs() - Timestamp::now().as_second());
    left.and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map_or(LIFE, |seconds| Duration::from_secs(seconds).min(LIFE))
}

/// What the audit log of the role's owner says: `[\w+=,.@-]{2,64}`.
fn session_name(account: &Account) -> String {
    let name = format!("imagemirror-{}-{}", account.namespace, account.name);
    name.chars().take(64).collect()
}

fn malformed(what: &str) -> ExchangeError {
    ExchangeError::Malformed { host: "Amazon".to_owned(), what: what.to_owned() }
}

fn no_identity() -> ExchangeError {
    let message = "this program has no identity at Amazon: give it one (to the operator's ServiceAccount by EKS Pod Identity \
                   or IAM roles for service accounts), or name a ServiceAccount in spec.serviceAccountName";
    Unusable { reason: Reason::AuthenticationFailed, message: message.to_owned() }.into()
}

/// What to do about a refusal of STS (docs.aws.amazon.com, AWS Security Token Service, `AssumeRoleWithWebIdentity`, Errors).
fn explain(error: ExchangeError, account: &Account, role: &str, audience: &str, token: &SecretString) -> ExchangeError {
    let ExchangeError::Refused { code: Some(code), .. } = &error else { return error };
    let issuer = || Claims::issuer_of(token);
    let advice = match code.as_str() {
        "AccessDenied" => {
            format!(
                "let the role {role} trust the issuer {} with the subject {} and the audience {audience}",
                issuer(),
                account.subject()
            )
        }
        "InvalidIdentityToken" => {
            format!("make {} an identity provider of the role's account, with the audience {audience}", issuer())
        }
        "IDPCommunicationError" => format!("let Amazon reach the keys that the issuer {} publishes", issuer()),
        "ExpiredTokenException" => "check that the cluster's clocks are right".to_owned(),
        "RegionDisabledException" => "activate STS for the registry's region in the role's account".to_owned(),
        _ => return error,
    };
    error.advised(advice)
}

/// The same of ECR, for one of its actions (docs.aws.amazon.com, Amazon ECR API, "Common Errors").
fn of_ecr<E>(error: SdkError<E, HttpResponse>, action: &str) -> ExchangeError
where
    E: StdError + ProvideErrorMetadata + Send + Sync + 'static,
{
    let error = failed("ECR", error, &[]);
    if matches!(&error, ExchangeError::Refused { code: Some(code), .. } if code == "AccessDeniedException") {
        return error.advised(format!("allow {action} in the policy of this identity's role or user"));
    }
    error
}

/// Tells what the service said from what came in between. `shown` is what it was shown besides a signature.
fn failed<E>(service: &str, error: SdkError<E, HttpResponse>, shown: &[&SecretString]) -> ExchangeError
where
    E: StdError + ProvideErrorMetadata + Send + Sync + 'static,
{
    if let SdkError::ServiceError(refusal) = &error {
        let code = refusal.err().code().map(str::to_owned);
        let is_throttled =
            code.as_deref().is_some_and(|code| code.contains("Throttl") || code.contains("TooManyRequests"));
        let status = StatusCode::from_u16(refusal.raw().status().as_u16()).unwrap_or(StatusCode::BAD_GATEWAY);
        let status = if is_throttled { StatusCode::TOO_MANY_REQUESTS } else { status };
        let message = refusal.err().message().map(str::to_owned);
        return ExchangeError::refused(service, status, code, message, shown);
    }
    let first: &(dyn StdError + 'static) = &error;
    let causes = || std::iter::successors(Some(first), |error| StdError::source(*error));
    let of_program = causes().find_map(|cause| cause.downcast_ref::<CredentialsError>());
    let is_unanswered = causes().any(<dyn StdError>::is::<ConnectorError>);
    match of_program {
        Some(CredentialsError::CredentialsNotLoaded(_)) => no_identity(),
        Some(_) if !is_unanswered => {
            let why = causes().last().map(ToString::to_string).unwrap_or_default();
            let message = format!("this program's own identity at Amazon could not be had: {why}; check its role");
            // It may be that Amazon, or its agent in the cluster, is busy.
            ExchangeError::NotNow(Unusable { reason: Reason::AuthenticationFailed, message })
        }
        _ => ExchangeError::Unanswered(Box::new(error)),
    }
}

/// Sends what Amazon's crates ask for.
#[derive(Clone, Debug)]
struct Bridge {
    http: Arc<dyn Http>,
    as_the_program: bool,
}

impl Bridge {
    fn over(http: &Arc<dyn Http>) -> SharedHttpClient {
        SharedHttpClient::new(Self { http: Arc::clone(http), as_the_program: false })
    }

    async fn send(self, request: HttpRequest) -> Result<HttpResponse, ConnectorError> {
        let (parts, body) = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?.into_parts();
        let body = body.bytes().map(Bytes::copy_from_slice);
        let body = body.ok_or_else(|| ConnectorError::user("a body that is a stream".into()))?;
        let mut request = http::Request::from_parts(parts, body);
        if self.as_the_program {
            request.extensions_mut().insert(ToMetadata);
        }
        let answer = self.http.send(request).await.map_err(|error| ConnectorError::other(error, None))?;
        HttpResponse::try_from(answer.map(SdkBody::from)).map_err(|error| ConnectorError::user(error.into()))
    }
}

impl HttpClient for Bridge {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for Bridge {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        HttpConnectorFuture::new(self.clone().send(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_lasts_as_long_as_it_is_said_to_and_twelve_hours_at_most() {
        let now = Timestamp::now().as_second();
        let of = |left: i64| life(Some(DateTime::from_secs(now + left))).as_secs();
        assert!((598..=600).contains(&of(600)), "{}", of(600));
        let longest = LIFE.as_secs();
        assert_eq!((of(100_000), of(-600), life(None)), (longest, longest, LIFE));
    }

    #[test]
    fn access_keys_are_known_by_their_names() {
        for (name, expected) in [
            ("AKIAIOSFODNN7EXAMPLE", true),
            ("AWS", false),
            ("ASIAIOSFODNN7EXAMPLE", false),
            ("AKIA", false),
            ("akiaiosfodnn7example", false),
            ("robot$akia", false),
        ] {
            assert_eq!(is_access_key(name), expected, "{name}");
        }
    }
}
