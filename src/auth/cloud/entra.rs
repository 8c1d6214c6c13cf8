//! The token of a `ServiceAccount`, or what the program itself has, for a token of Entra, and that one for a refresh token of
//! the registry (`acr.rs`).
//!
//! What is said to Entra is the work of `azure_identity`, over our own [`Http`]: so that proxies, certificates and closed
//! networks hold here as elsewhere. Neither its cache nor its repetitions are used, as whoever asks for an [`Exchange`] has
//! both: each exchange makes a credential anew, and a refusal reaches the crate as an error, which it does not repeat.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use azure_core::{
    cloud::CloudConfiguration,
    credentials::TokenCredential,
    error::ErrorKind,
    http::{
        AsyncRawResponse, Body, ClientMethodOptions, ClientOptions, HttpClient, Request, RetryOptions, Transport,
        headers::Headers,
    },
};
use azure_identity::{
    ClientAssertion, ClientAssertionCredential, ClientAssertionCredentialOptions, ManagedIdentityCredential,
    ManagedIdentityCredentialOptions, UserAssignedId, WorkloadIdentityCredential, WorkloadIdentityCredentialOptions,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::{
    Account, AcrToken, Cloud, Principal,
    acr::Claims,
    azure::{CLIENT_ID, TENANT_ID},
};
use crate::{
    auth::{Credential, Exchange, ExchangeError, Http, Issued, ToMetadata, Unusable},
    oci::Host,
    reason::Reason,
};

/// For whom a token of a `ServiceAccount` is, by Entra's convention.
const AUDIENCE: &str = "api://AzureADTokenExchange";
/// What tokens of Entra are for: the registries alone, in all clouds. Those for Azure's management do more, and are refused
/// where a registry's `authentication-as-arm` is off.
const SCOPE: &str = "https://containerregistry.azure.net/.default";

/// The application, by its client and its tenant, is that of a `ServiceAccount`.
pub(super) fn login(host: &Host, principal: &Principal, application: Option<(&str, &str)>) -> Credential {
    let (cloud, origin) = (Cloud::Azure, principal.origin());
    let (who, name) = match (principal, application) {
        (Principal::Account(account), Some((client, tenant))) => {
            // Quoted, so that no two principals have one name.
            let name = format!("{cloud} {:?} {:?} {tenant:?} {client:?}", account.namespace, account.name);
            let application = Application { client: client.to_owned(), tenant: tenant.to_owned() };
            (Who::Account(account.clone(), application), name)
        }
        _ => (Who::Program, cloud.to_string()),
    };
    let entra = Entra { host: host.clone(), who, origin: origin.clone() };
    Credential::exchanged(Arc::new(entra), &name, &origin)
}

enum Who {
    Program,
    Account(Account, Application),
}

/// An application of Entra.
#[derive(Clone)]
struct Application {
    client: String,
    tenant: String,
}

/// An identity of Entra at one registry.
struct Entra {
    host: Host,
    who: Who,
    origin: String,
}

impl Entra {
    async fn ask(&self, http: &Arc<dyn Http>) -> Result<Issued, ExchangeError> {
        let (token, tenant) = match &self.who {
            Who::Program => (self.of_program(http).await?, None),
            Who::Account(account, application) => {
                (self.of_account(http, account, application).await?, Some(application.tenant.clone()))
            }
        };
        let registry = AcrToken::new(self.host.clone(), token, &self.origin).of_tenant(tenant);
        let advice = || "check that it is an identity of the registry's own tenant, with a role there".to_owned();
        registry.exchange(Arc::clone(http)).await.map_err(|error| match error {
            ExchangeError::Refused { status: 400..500, .. } => error.advised(advice()),
            error => error,
        })
    }

    async fn of_account(
        &self,
        http: &Arc<dyn Http>,
        account: &Account,
        application: &Application,
    ) -> Result<SecretString, ExchangeError> {
        let assertion = account.identity.token(AUDIENCE).await?;
        let way = Way::new(http, false);
        let options = ClientAssertionCredentialOptions { client_options: self.options(&way) };
        let Application { tenant, client } = application.clone();
        let credential = ClientAssertionCredential::new(tenant, client, Assertion(assertion.clone()), Some(options));
        let credential =
            credential.map_err(|error| unusable(Reason::SecretInvalid, &format!("{TENANT_ID}: {error}")))?;
        way.token(&*credential).await.map_err(|error| explain(error, account, application, &assertion))
    }

    /// What the webhook of workload identity has put into the Pod, else the identity of the machine.
    async fn of_program(&self, http: &Arc<dyn Http>) -> Result<SecretString, ExchangeError> {
        let way = Way::new(http, true);
        let options = WorkloadIdentityCredentialOptions {
            credential_options: ClientAssertionCredentialOptions { client_options: self.options(&way) },
            ..WorkloadIdentityCredentialOptions::default()
        };
        if let Ok(credential) = WorkloadIdentityCredential::new(Some(options)) {
            return way.token(&*credential).await;
        }
        let options = ManagedIdentityCredentialOptions {
            // Which one, where a machine has several: the crate leaves this variable to its caller.
            user_assigned_id: std::env::var("AZURE_CLIENT_ID").ok().map(UserAssignedId::ClientId),
            client_options: self.options(&way),
        };
        let credential = ManagedIdentityCredential::new(Some(options));
        let credential = credential.map_err(|error| unusable(Reason::InternalError, &error.to_string()))?;
        let advice = "give the program an identity: by workload identity (AZURE_CLIENT_ID, AZURE_TENANT_ID and \
                      AZURE_FEDERATED_TOKEN_FILE), or a managed one of the machine";
        way.token(&*credential).await.map_err(|error| error.advised(advice.to_owned()))
    }

    fn options(&self, way: &Arc<Way>) -> ClientOptions {
        // By the registry, not by AZURE_AUTHORITY_HOST: a program of one cloud may log in at another.
        let cloud = match self.host.as_str().rsplit_once('.').map(|(_, last)| last) {
            Some("cn") => CloudConfiguration::AzureChina,
            Some("us") => CloudConfiguration::AzureGovernment,
            _ => CloudConfiguration::AzurePublic,
        };
        let transport = Some(Transport::new(Arc::<Way>::clone(way)));
        ClientOptions {
            transport,
            retry: RetryOptions::none(),
            cloud: Some(Arc::new(cloud)),
            ..ClientOptions::default()
        }
    }
}

impl Exchange for Entra {
    fn exchange(&self, http: Arc<dyn Http>) -> BoxFuture<'_, Result<Issued, ExchangeError>> {
        Box::pin(async move { self.ask(&http).await })
    }

    fn advice(&self) -> Option<&'static str> {
        Some("give this identity a role at the registry: AcrPull to read, AcrPush to write")
    }
}

impl fmt::Debug for Entra {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entra({} of {})", self.host, self.origin)
    }
}

fn unusable(reason: Reason, message: &str) -> ExchangeError {
    ExchangeError::Unusable(Unusable { reason, message: message.to_owned() })
}

/// What to do about a refusal of Entra (learn.microsoft.com, "Microsoft Entra authentication and authorization error codes").
fn explain(
    error: ExchangeError,
    account: &Account,
    application: &Application,
    assertion: &SecretString,
) -> ExchangeError {
    let ExchangeError::Refused { code: Some(code), .. } = &error else { return error };
    let Application { client, tenant } = application;
    let advice = match code.as_str() {
        "AADSTS70021" | "AADSTS700211" | "AADSTS700212" | "AADSTS700213" => {
            let issuer = Claims::issuer_of(assertion);
            let subject = account.subject();
            format!(
                "give application {client} in Entra a federated credential with the issuer {issuer}, the subject {subject} \
                 and the audience {AUDIENCE}"
            )
        }
        "AADSTS700016" | "AADSTS90002" | "AADSTS900023" | "AADSTS500011" => format!(
            "correct the annotations of ServiceAccount {:?}: {CLIENT_ID} is {client}, {TENANT_ID} is {tenant}",
            account.name
        ),
        "AADSTS700024" | "AADSTS500133" => "check that the cluster's clocks are right".to_owned(),
        _ => return error,
    };
    error.advised(advice)
}

/// A token that is there already.
struct Assertion(SecretString);

#[async_trait]
impl ClientAssertion for Assertion {
    async fn secret(&self, _: Option<ClientMethodOptions<'_>>) -> azure_core::Result<String> {
        Ok(self.0.expose_secret().to_owned())
    }
}

impl fmt::Debug for Assertion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Assertion([redacted])")
    }
}

/// Our [`Http`] as the crate wants it. What goes wrong is kept here: the crate's errors say less of it.
#[derive(Debug)]
struct Way {
    http: Arc<dyn Http>,
    is_of_program: bool,
    failed: Mutex<Option<ExchangeError>>,
}

impl Way {
    fn new(http: &Arc<dyn Http>, is_of_program: bool) -> Arc<Self> {
        Arc::new(Self { http: Arc::clone(http), is_of_program, failed: Mutex::default() })
    }

    async fn token(&self, credential: &dyn TokenCredential) -> Result<SecretString, ExchangeError> {
        match credential.get_token(&[SCOPE], None).await {
            Ok(token) => Ok(token.token.secret().to_owned().into()),
            Err(_) => {
                let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
                let malformed =
                    || ExchangeError::Malformed { host: "Entra".into(), what: "its answer holds no token".into() };
                Err(failed.unwrap_or_else(malformed))
            }
        }
    }

    async fn send(&self, request: &Request) -> Result<http::Response<Bytes>, ExchangeError> {
        let host = request.url().host_str().unwrap_or_default();
        let malformed = |what: String| ExchangeError::Malformed { host: host.to_owned(), what };
        let Body::Bytes(body) = request.body() else { return Err(malformed("a body without an end".to_owned())) };
        let mut ours = http::Request::builder().method(request.method().as_ref()).uri(request.url().as_str());
        for (name, value) in request.headers().iter() {
            ours = ours.header(name.as_str(), value.as_str());
        }
        if self.is_of_program {
            ours = ours.extension(ToMetadata);
        }
        let ours = ours.body(body.clone()).map_err(|error| malformed(error.to_string()))?;
        let answer = self.http.send(ours).await.map_err(ExchangeError::Unanswered)?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let refusal: Refusal = serde_json::from_slice(answer.body()).unwrap_or_default();
        let shown = url::form_urlencoded::parse(body).find(|(name, _)| name == "client_assertion");
        let shown: SecretString = shown.map(|(_, assertion)| assertion.into_owned()).unwrap_or_default().into();
        let shown: &[_] = if shown.expose_secret().is_empty() { &[] } else { &[&shown] };
        Err(ExchangeError::refused(host, answer.status(), refusal.code(), refusal.message(), shown))
    }
}

#[async_trait]
impl HttpClient for Way {
    async fn execute_request(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
        match self.send(request).await {
            Ok(answer) => {
                let status = answer.status().as_u16().into();
                Ok(AsyncRawResponse::from_bytes(status, Headers::new(), answer.into_body()))
            }
            Err(error) => {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // Not of the kinds that are repeated.
                Err(azure_core::Error::with_message(ErrorKind::Credential, "refused"))
            }
        }
    }
}

/// An error of Entra, and of the metadata service.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    error: Option<String>,
    error_description: String,
    error_codes: Vec<u32>,
}

impl Refusal {
    fn code(&self) -> Option<String> {
        self.error_codes.first().map(|code| format!("AADSTS{code}")).or_else(|| self.error.clone())
    }

    /// Without the code, and without what is for Microsoft alone.
    fn message(&self) -> Option<String> {
        let first = self.error_description.split(['\r', '\n']).next().unwrap_or_default();
        let first = first.split(" Trace ID").next().unwrap_or_default();
        let words =
            first.split_once(": ").filter(|(code, _)| code.starts_with("AADSTS")).map_or(first, |(_, rest)| rest);
        Some(words.trim().to_owned()).filter(|words| !words.is_empty())
    }
}
