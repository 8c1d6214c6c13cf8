//! An identity at Google, for Artifact Registry and Container Registry.
//!
//! The token of a `ServiceAccount` is exchanged at the Security Token Service (RFC 8693), and what comes of that, where an
//! annotation names a service account of Google's, for a token of that one (cloud.google.com, "Workload Identity Federation
//! with Kubernetes"). These are two requests, made here: `google-cloud-auth` makes its own HTTP clients and takes none from
//! us, so that proxies, certificates and closed networks of the administrator would not hold for what a tenant causes.
//!
//! The program's own identity is found by that crate (feature `gcp`): the metadata server, or what
//! `GOOGLE_APPLICATION_CREDENTIALS` names. No tenant has a say in where it asks.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, header};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, de::DeserializeOwned};

use super::{Account, Cloud, Principal, acr::Claims};
use crate::{
    auth::{Credential, Exchange, ExchangeError, Http, Issued, Unusable},
    reason::Reason,
};

/// The service account of Google's that a `ServiceAccount` is; none: it is somebody itself.
const SERVICE_ACCOUNT: &str = "iam.gke.io/gcp-service-account";
/// By what Google knows the cluster, in place of what the operator's configuration says.
const TRUST: &str = "imagemirror.dev/gcp-workload-identity";
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const STS: &str = "sts.googleapis.com";
const IAM: &str = "iamcredentials.googleapis.com";
/// What an access token is the password of.
const USER: &str = "oauth2accesstoken";
/// What somebody needs at a registry.
const RIGHTS: &str = "give this identity a role in the registry's project: roles/artifactregistry.reader or writer";
/// An hour is as much as there is without a policy of the organisation.
const LIFE: Duration = Duration::from_hours(1);

/// By what Google knows a cluster whose `ServiceAccount`s it believes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GcpTrust {
    /// A cluster of GKE with workload identity.
    Cluster {
        /// Its project.
        project: String,
        /// `projects/<project>/locations/<location>/clusters/<name>`.
        resource: String,
    },
    /// A provider of a workload identity pool, for every other cluster.
    Provider {
        /// `projects/<number>/locations/global/workloadIdentityPools/<pool>`.
        pool: String,
        /// The pool's, with `/providers/<name>`.
        resource: String,
    },
}

/// What is neither a cluster nor a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write projects/PROJECT/locations/LOCATION/clusters/NAME of a GKE cluster, or \
     projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/NAME"
)]
pub struct GcpTrustError;

impl FromStr for GcpTrust {
    type Err = GcpTrustError;

    fn from_str(text: &str) -> Result<Self, GcpTrustError> {
        let is_part = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let parts: Vec<&str> = text.split('/').collect();
        let names = parts.iter().skip(1).step_by(2);
        // A project may belong to a domain: `example.com:project`.
        let is_name = |part: &&str| is_part(&part.replace([':', '.', '_'], "-").as_str());
        if !names.clone().all(is_name) {
            return Err(GcpTrustError);
        }
        match parts[..] {
            ["projects", project, "locations", _, "clusters", _] => {
                Ok(Self::Cluster { project: project.to_owned(), resource: text.to_owned() })
            }
            ["projects", number, "locations", "global", "workloadIdentityPools", pool, "providers", _] => {
                let pool = format!("projects/{number}/locations/global/workloadIdentityPools/{pool}");
                Ok(Self::Provider { pool, resource: text.to_owned() })
            }
            _ => Err(GcpTrustError),
        }
    }
}

impl fmt::Display for GcpTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Cluster { resource, .. } | Self::Provider { resource, .. }) = self;
        f.write_str(resource)
    }
}

impl GcpTrust {
    /// For whom the token of a `ServiceAccount` is.
    fn audience(&self) -> String {
        match self {
            Self::Cluster { project, .. } => format!("{project}.svc.id.goog"),
            Self::Provider { resource, .. } => format!("https://iam.googleapis.com/{resource}"),
        }
    }

    /// Who is asked to believe it.
    fn of_exchange(&self) -> String {
        match self {
            Self::Cluster { project, resource } => {
                format!("identitynamespace:{project}.svc.id.goog:https://container.googleapis.com/v1/{resource}")
            }
            Self::Provider { resource, .. } => format!("//iam.googleapis.com/{resource}"),
        }
    }

    /// What the `ServiceAccount` is called where rights are given.
    fn member(&self, account: &Account) -> String {
        match self {
            Self::Cluster { project, .. } => {
                format!("serviceAccount:{project}.svc.id.goog[{}/{}]", account.namespace, account.name)
            }
            Self::Provider { pool, .. } => {
                format!("principal://iam.googleapis.com/{pool}/subject/{}", account.subject())
            }
        }
    }
}

pub(super) fn login(principal: &Principal) -> Result<Credential, Unusable> {
    let origin = principal.origin();
    let Principal::Account(account) = principal else {
        #[cfg(feature = "gcp")]
        return Ok(own::login(&origin));
        #[cfg(not(feature = "gcp"))]
        return Err(super::not_built(Cloud::Gcp));
    };
    let annotation = |key| account.annotations.get(key).filter(|value: &&String| !value.is_empty());
    let wrong = |key: &str, problem: &dyn fmt::Display| Unusable {
        reason: Reason::SecretInvalid,
        message: format!("the annotation {key} of ServiceAccount {:?} is not valid: {problem}", account.name),
    };
    let trust = match annotation(TRUST) {
        Some(text) => text.parse().map_err(|error: GcpTrustError| wrong(TRUST, &error))?,
        None => account.gcp_trust.clone().ok_or_else(|| Unusable {
            reason: Reason::SecretInvalid,
            message: format!(
                "by what Google knows this cluster is not said; add the annotation {TRUST} to ServiceAccount {:?}, or \
                 gcp.workloadIdentity to the operator's configuration (kubectl imagemirror: --gcp-workload-identity)",
                account.name
            ),
        })?,
    };
    let email = annotation(SERVICE_ACCOUNT).cloned();
    if email.as_ref().is_some_and(|email| !is_email(email)) {
        return Err(wrong(SERVICE_ACCOUNT, &"write NAME@PROJECT.iam.gserviceaccount.com"));
    }
    // Quoted, so that no two principals have one name.
    let name = format!("{} {:?} {:?} {trust:?} {email:?}", Cloud::Gcp, account.namespace, account.name);
    let federation = Federation { account: account.clone(), trust, email, origin: origin.clone() };
    Ok(Credential::exchanged(Arc::new(federation), &name, &origin))
}

/// It becomes a part of a path.
fn is_email(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.')
    };
    text.split_once('@').is_some_and(|(name, domain)| is_part(name) && is_part(domain))
}

fn issued(token: SecretString, life: Duration, origin: &str) -> Issued {
    Issued { credential: Arc::new(Credential::new(USER.to_owned(), token, origin)), life }
}

/// A `ServiceAccount` at Google.
#[derive(Debug)]
struct Federation {
    account: Account,
    trust: GcpTrust,
    email: Option<String>,
    origin: String,
}

impl Federation {
    async fn ask(&self, http: &dyn Http) -> Result<Issued, ExchangeError> {
        let token = self.account.identity.token(&self.trust.audience()).await?;
        let (federated, life) = self.federated(http, &token).await?;
        let (token, life) = match &self.email {
            None => (federated, life),
            Some(email) => self.impersonated(http, &federated, email).await?,
        };
        Ok(issued(token, life, &self.origin))
    }

    async fn federated(
        &self,
        http: &dyn Http,
        token: &SecretString,
    ) -> Result<(SecretString, Duration), ExchangeError> {
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
            .append_pair("audience", &self.trust.of_exchange())
            .append_pair("scope", SCOPE)
            .append_pair("requested_token_type", "urn:ietf:params:oauth:token-type:access_token")
            .append_pair("subject_token", token.expose_secret())
            .append_pair("subject_token_type", "urn:ietf:params:oauth:token-type:jwt")
            .finish();
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(format!("https://{STS}/v1/token"))
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Bytes::from(form));
        let answer = send::<Federated>(http, STS, request, token).await;
        let answer = answer.map_err(|error| match error {
            ExchangeError::Refused { status: 400..=403, .. } => {
                let issuer = Claims::issuer_of(token);
                let advice = format!(
                    "check that {} is there and trusts the issuer {issuer} with the audience {}",
                    self.trust,
                    self.trust.audience()
                );
                error.advised(advice)
            }
            error => error,
        })?;
        Ok((answer.access_token, life(answer.expires_in)))
    }

    async fn impersonated(
        &self,
        http: &dyn Http,
        federated: &SecretString,
        email: &str,
    ) -> Result<(SecretString, Duration), ExchangeError> {
        let wanted = serde_json::json!({"scope": [SCOPE], "lifetime": format!("{}s", LIFE.as_secs())});
        let bearer = HeaderValue::from_str(&format!("Bearer {}", federated.expose_secret()));
        let mut bearer = bearer.map_err(|_| malformed(STS, "its token is none"))?;
        bearer.set_sensitive(true);
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(format!("https://{IAM}/v1/projects/-/serviceAccounts/{email}:generateAccessToken"))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, bearer)
            .body(Bytes::from(wanted.to_string()));
        let answer = send::<Impersonated>(http, IAM, request, federated).await;
        let answer = answer.map_err(|error| match error {
            ExchangeError::Refused { status: 403, .. } => {
                let member = self.trust.member(&self.account);
                error.advised(format!("grant {member} the role roles/iam.workloadIdentityUser on {email}"))
            }
            ExchangeError::Refused { status: 404, .. } => ExchangeError::Unusable(Unusable {
                reason: Reason::AuthenticationFailed,
                message: format!(
                    "Google knows no service account {email}; correct the annotation {SERVICE_ACCOUNT} of {}",
                    self.origin
                ),
            }),
            error => error,
        })?;
        // Of a clock that is wrong nothing is believed that is longer than what was asked for.
        let end = answer.expire_time.map(|end| end.as_second() - Timestamp::now().as_second());
        Ok((answer.access_token, life(end.and_then(|seconds| u64::try_from(seconds).ok()))))
    }
}

impl Exchange for Federation {
    fn exchange(&self, http: Arc<dyn Http>) -> BoxFuture<'_, Result<Issued, ExchangeError>> {
        Box::pin(async move { self.ask(&*http).await })
    }

    fn advice(&self) -> Option<&'static str> {
        Some(RIGHTS)
    }
}

fn life(seconds: Option<u64>) -> Duration {
    seconds.map_or(LIFE, |seconds| Duration::from_secs(seconds.max(1)).min(LIFE))
}

fn malformed(host: &str, what: &str) -> ExchangeError {
    ExchangeError::Malformed { host: host.to_owned(), what: what.to_owned() }
}

/// Sends a request that shows a secret.
async fn send<T: DeserializeOwned>(
    http: &dyn Http,
    host: &str,
    request: Result<http::Request<Bytes>, http::Error>,
    shown: &SecretString,
) -> Result<T, ExchangeError> {
    let request = request.map_err(|error| malformed(host, &error.to_string()))?;
    let answer = http.send(request).await.map_err(ExchangeError::Unanswered)?;
    if answer.status().is_success() {
        return serde_json::from_slice(answer.body()).map_err(|_| malformed(host, "its answer holds no token"));
    }
    let (code, message) = match serde_json::from_slice(answer.body()) {
        Ok(Refusal { error: Wrong::OfOAuth(code), error_description }) => (Some(code), error_description),
        Ok(Refusal { error: Wrong::OfGoogle { status, message }, .. }) => (status, message),
        Err(_) => (None, None),
    };
    Err(ExchangeError::refused(host, answer.status(), code, message, &[shown]))
}

#[derive(Deserialize)]
struct Federated {
    access_token: SecretString,
    expires_in: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Impersonated {
    access_token: SecretString,
    expire_time: Option<Timestamp>,
}

/// Both forms in which Google says no (RFC 6749, section 5.2; cloud.google.com/apis/design/errors).
#[derive(Deserialize)]
struct Refusal {
    error: Wrong,
    error_description: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Wrong {
    OfOAuth(String),
    OfGoogle { status: Option<String>, message: Option<String> },
}

/// The program's own identity.
#[cfg(feature = "gcp")]
mod own {
    use std::{sync::Arc, time::Duration};

    use futures::future::BoxFuture;
    use google_cloud_auth::{credentials::Builder, errors::CredentialsError};

    use super::{Cloud, RIGHTS, SCOPE, issued};
    use crate::{
        auth::{Credential, Exchange, ExchangeError, Http, Issued, Unusable},
        reason::Reason,
    };

    /// The crate does not say how long a token is good for; what it gives anew is so for longer than this: the metadata
    /// server keeps none in its last five minutes.
    const LIFE: Duration = Duration::from_mins(5);
    /// The crate waits without an end.
    const PATIENCE: Duration = Duration::from_secs(30);
    const ADVICE: &str = "give the program an identity at Google: workload identity of its Pod, or \
                          GOOGLE_APPLICATION_CREDENTIALS";

    pub(super) fn login(origin: &str) -> Credential {
        Credential::exchanged(Arc::new(Program { origin: origin.to_owned() }), &Cloud::Gcp.to_string(), origin)
    }

    #[derive(Debug)]
    struct Program {
        origin: String,
    }

    impl Program {
        /// Anew each time: the crate's own cache would give again what a registry has refused.
        async fn ask(&self) -> Result<Issued, ExchangeError> {
            let unusable = |words: String| {
                let message = format!("no token of {} could be had: {words}; {ADVICE}", self.origin);
                ExchangeError::Unusable(Unusable { reason: Reason::AuthenticationFailed, message })
            };
            let built = Builder::default().with_scopes([SCOPE]).build_access_token_credentials();
            let credentials = built.map_err(|error| unusable(error.to_string()))?;
            match tokio::time::timeout(PATIENCE, credentials.access_token()).await {
                Ok(Ok(token)) => Ok(issued(token.token.into(), LIFE, &self.origin)),
                Ok(Err(error)) if error.is_transient() => {
                    Err(ExchangeError::Unanswered(Box::new(error)).advised(ADVICE.to_owned()))
                }
                Ok(Err(error)) => Err(unusable(words(&error))),
                Err(late) => Err(ExchangeError::Unanswered(Box::new(late)).advised(ADVICE.to_owned())),
            }
        }
    }

    /// Without what was answered, which may hold anything.
    fn words(error: &CredentialsError) -> String {
        let words = error.to_string();
        words.split(", body=").next().unwrap_or_default().to_owned()
    }

    impl Exchange for Program {
        fn exchange(&self, _: Arc<dyn Http>) -> BoxFuture<'_, Result<Issued, ExchangeError>> {
            Box::pin(self.ask())
        }

        fn advice(&self) -> Option<&'static str> {
            Some(RIGHTS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_and_a_provider_are_told_by_their_names_and_nothing_else_is_one() {
        let cluster: GcpTrust = "projects/p-1/locations/europe-west1/clusters/c".parse().unwrap();
        assert_eq!(cluster.audience(), "p-1.svc.id.goog");
        let base = "https://container.googleapis.com/v1/projects/p-1/locations/europe-west1/clusters/c";
        assert_eq!(cluster.of_exchange(), format!("identitynamespace:p-1.svc.id.goog:{base}"));
        let name = "projects/7/locations/global/workloadIdentityPools/pool/providers/x";
        let provider: GcpTrust = name.parse().unwrap();
        assert_eq!(provider.audience(), format!("https://iam.googleapis.com/{name}"));
        assert_eq!(provider.of_exchange(), format!("//iam.googleapis.com/{name}"));
        assert_eq!(provider.to_string(), name);
        for bad in [
            "",
            "projects/p/locations/l/clusters/",
            "projects/p/locations/l/clusters/c/x",
            "//iam.googleapis.com/projects/7/locations/global/workloadIdentityPools/pool/providers/x",
            "projects/7/locations/eu/workloadIdentityPools/pool/providers/x",
            "projects/7/locations/global/workloadIdentityPools/a b/providers/x",
            "projects/7/locations/global/workloadIdentityPools/pool/providers/x?y",
        ] {
            assert_eq!(bad.parse::<GcpTrust>(), Err(GcpTrustError), "{bad}");
        }
    }

    #[test]
    fn an_address_is_a_name_at_a_domain_and_no_other_path() {
        assert!(is_email("mirror@team-a.iam.gserviceaccount.com"));
        for bad in ["", "mirror", "@b", "a@", "a/../b@c", "a@b:generateIdToken?", "a@b@c", "a%2f@b"] {
            assert!(!is_email(bad), "{bad}");
        }
    }
}
