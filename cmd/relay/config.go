package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/dbschema"
)

// Values of flags are parsed here and not by kong, which ends at the first mistake.

type duration struct {
	time.Duration
	raw string
	err error
}

func (d *duration) UnmarshalText(text []byte) error {
	d.raw = string(text)
	d.Duration, d.err = time.ParseDuration(d.raw)
	return nil
}

// check returns a problem unless the duration is above zero.
func (d duration) check(flag string) error {
	if d.err != nil {
		return fmt.Errorf("--%s: %q is no duration such as 15s", flag, d.raw)
	}
	if d.Duration <= 0 {
		return fmt.Errorf("--%s: %s is not above zero", flag, d.Duration)
	}
	return nil
}

type toggle struct {
	on  bool
	raw string // if it is neither true nor false
}

func (t *toggle) IsBool() bool { return true }

func (t *toggle) Decode(ctx *kong.DecodeContext) error {
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		t.on = true
		return nil
	}
	switch raw := fmt.Sprint(ctx.Scan.Pop().Value); strings.ToLower(raw) {
	case "true", "1", "yes", "on":
		t.on = true
	case "false", "0", "no", "off", "":
		t.on = false
	default:
		t.raw = raw
	}
	return nil
}

func (t *toggle) check(flag string) error {
	if t.raw != "" {
		return fmt.Errorf("--%s: %q is neither true nor false", flag, t.raw)
	}
	return nil
}

const fileSuffix = "_FILE"

// secretVariables may each be replaced by one that ends in _FILE and names a file
// that holds the value.
var secretVariables = []string{"TXBOX_DATABASE_URL", "DATABASE_URL", "TXBOX_AMQP_URL", "AMQP_URL"}

// secret returns the flag's value, or the first variable or file that is set.
func secret(flag, value string, variables ...string) (string, error) {
	if value != "" {
		return value, nil
	}
	for _, name := range variables {
		value, path := os.Getenv(name), os.Getenv(name+fileSuffix)
		switch {
		case value != "" && path != "":
			return "", fmt.Errorf("$%s and $%s%s are both set", name, name, fileSuffix)
		case value != "":
			return value, nil
		case path != "":
			content, err := os.ReadFile(path)
			if err != nil {
				return "", fmt.Errorf("$%s%s: %w", name, fileSuffix, err)
			}
			if value := strings.TrimSpace(string(content)); value != "" {
				return value, nil
			}
			return "", fmt.Errorf("$%s%s: the file is empty", name, fileSuffix)
		}
	}
	return "", fmt.Errorf("--%s: not set; nor is $%s", flag, variables[len(variables)-1])
}

// databaseFlags say where the tables are.
type databaseFlags struct {
	DatabaseURL    string `help:"PostgreSQL, as postgres://user:password@host:port/database; also from $$DATABASE_URL, $$DATABASE_URL_FILE or $$PG*. A password is better not on a command line." placeholder:"URL"`
	Schema         string `help:"Database schema of the tables." default:"txbox" env:"TXBOX_SCHEMA"`
	AllowPlaintext toggle `help:"Permit connections without TLS to hosts other than this." env:"TXBOX_ALLOW_PLAINTEXT"`
}

// check returns what is wrong with the flags, and the URL.
func (f *databaseFlags) check() (databaseURL string, config *pgxpool.Config, problems []error) {
	if err := f.AllowPlaintext.check("allow-plaintext"); err != nil {
		problems = append(problems, err)
	}
	if _, err := dbschema.Name(f.Schema); err != nil {
		problems = append(problems, fmt.Errorf("--schema: %w", err))
	}
	databaseURL, err := secret("database-url", f.DatabaseURL, "TXBOX_DATABASE_URL", "DATABASE_URL")
	if err != nil && databaseURL == "" && os.Getenv("PGHOST") != "" {
		err = nil // pgx reads the PG* variables
	}
	if err == nil {
		config, err = parseDatabaseURL(databaseURL, f.AllowPlaintext.on)
	}
	if err != nil {
		problems = append(problems, err)
	}
	return databaseURL, config, problems
}

func parseDatabaseURL(raw string, allowPlaintext bool) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(raw)
	if err != nil {
		return nil, fmt.Errorf("--database-url: %w", withoutSecrets(raw, err))
	}
	if strings.Contains(config.ConnConfig.Host, "@") { // of the password, not encoded
		return nil, fmt.Errorf("--database-url: %w", errMalformed)
	}
	explicit := allowPlaintext || strings.Contains(raw, "sslmode=") || os.Getenv("PGSSLMODE") != ""
	if !explicit && config.ConnConfig.TLSConfig == nil && !isLocal(config.ConnConfig.Host) {
		return nil, plaintext(config.ConnConfig.Host)
	}
	for _, fallback := range config.ConnConfig.Fallbacks {
		if !explicit && fallback.TLSConfig == nil && !isLocal(fallback.Host) {
			return nil, plaintext(fallback.Host)
		}
	}
	config.ConnConfig.RuntimeParams["application_name"] = "txbox relay"
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = 10 * time.Second
	}
	return config, nil
}

func plaintext(host string) error {
	return fmt.Errorf("--database-url: would fall back to plaintext to %q; say sslmode=verify-full, another sslmode, or --allow-plaintext", host)
}

func isLocal(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || strings.HasPrefix(host, "/") || err == nil && addr.IsLoopback()
}

var errMalformed = errors.New("malformed; want postgres://user:password@host:port/database, with special characters percent-encoded")

// withoutSecrets keeps what is wrong of an error about a URL, if that cannot hold a
// piece of the password: in a URL that does not parse it may be anywhere.
func withoutSecrets(raw string, err error) error {
	u, parseErr := url.Parse(raw)
	if parseErr != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return errMalformed
	}
	inner := err
	for errors.Unwrap(inner) != nil {
		inner = errors.Unwrap(inner)
	}
	text := inner.Error()
	for _, piece := range append(strings.FieldsFunc(raw, func(r rune) bool { return strings.ContainsRune(":@/?&=#", r) }), raw) {
		if u.User != nil && strings.Contains(u.User.String(), piece) && strings.Contains(text, piece) {
			return errMalformed
		}
	}
	if text == err.Error() { // nothing was unwrapped: the text may quote the URL
		return errMalformed
	}
	return errors.New(text)
}

// brokerFlags say where the broker is.
type brokerFlags struct {
	AMQPURL        string   `name:"amqp-url" help:"RabbitMQ, as amqps://user:password@host:port/vhost, several separated by commas; also from $$AMQP_URL or $$AMQP_URL_FILE." placeholder:"URL"`
	WriteTimeout   duration `help:"Longest write to the broker before the connection is given up." default:"10s" env:"TXBOX_WRITE_TIMEOUT"`
	ConfirmTimeout duration `help:"Longest wait for the broker's answer to a message; at most --lease." default:"15s" env:"TXBOX_CONFIRM_TIMEOUT"`
	TLSCA          string   `name:"amqp-tls-ca" help:"File with the CA certificates to trust, PEM; default: the system's." env:"TXBOX_AMQP_TLS_CA" placeholder:"FILE"`
	TLSCert        string   `name:"amqp-tls-cert" help:"File with a client certificate, PEM." env:"TXBOX_AMQP_TLS_CERT" placeholder:"FILE"`
	TLSKey         string   `name:"amqp-tls-key" help:"File with its key, PEM." env:"TXBOX_AMQP_TLS_KEY" placeholder:"FILE"`
}

// tls returns nil if no flag asks for anything.
func (f *brokerFlags) tls() (config *tls.Config, problems []error) {
	if f.TLSCA == "" && f.TLSCert == "" && f.TLSKey == "" {
		return nil, nil
	}
	config = &tls.Config{MinVersion: tls.VersionTLS12}
	if f.TLSCA != "" {
		config.RootCAs = x509.NewCertPool()
		pem, err := os.ReadFile(f.TLSCA)
		if err == nil && !config.RootCAs.AppendCertsFromPEM(pem) {
			err = fmt.Errorf("%s holds no certificate", f.TLSCA)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("--amqp-tls-ca: %w", err))
		}
	}
	switch {
	case f.TLSCert != "" && f.TLSKey != "":
		certificate, err := tls.LoadX509KeyPair(f.TLSCert, f.TLSKey)
		if err != nil {
			problems = append(problems, fmt.Errorf("--amqp-tls-cert, --amqp-tls-key: %w", err))
		}
		config.Certificates = []tls.Certificate{certificate}
	case f.TLSCert != f.TLSKey:
		problems = append(problems, errors.New("--amqp-tls-cert and --amqp-tls-key: one needs the other"))
	}
	return config, problems
}

// wrongUsage is nil if there are no problems.
func wrongUsage(problems []error) error {
	if len(problems) == 0 {
		return nil
	}
	return usageError{fmt.Errorf("the configuration is wrong:\n%w", errors.Join(problems...))}
}
