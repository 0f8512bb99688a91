package main

import (
	"errors"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/dbschema"
)

// databaseFlags say where the tables are.
type databaseFlags struct {
	DatabaseURL    string `help:"PostgreSQL, as postgres://user:password@host:port/database; also from $$DATABASE_URL, $$DATABASE_URL_FILE or $$PG*. A password is better not on a command line." placeholder:"URL"`
	Schema         string `help:"Database schema of the tables." default:"txbox" env:"TXBOX_SCHEMA"`
	AllowPlaintext toggle `help:"Permit connections without TLS to hosts other than this." env:"TXBOX_ALLOW_PLAINTEXT"`
}

// check returns what is wrong with the flags, and the URL; it is empty if pgx is
// to read the PG* variables.
func (f *databaseFlags) check() (databaseURL string, config *pgxpool.Config, found mistakes) {
	found.add(f.AllowPlaintext.check("allow-plaintext"))
	schema, err := dbschema.Name(f.Schema)
	switch {
	case err != nil && strings.ContainsAny(f.Schema, ":@/="):
		found.add(mistake("schema", "is no name"))
	case err != nil:
		found.add(mistake("schema", "%w", err))
	default:
		f.Schema = schema
	}
	databaseURL, err = secret("database-url", f.DatabaseURL, "TXBOX_DATABASE_URL", "DATABASE_URL")
	if errors.Is(err, errNotSet) && postgresVariables() {
		err = nil
	}
	if err == nil {
		config, err = parseDatabaseURL(databaseURL, f.AllowPlaintext.on)
	}
	found.add(err)
	return databaseURL, config, found
}

// postgresVariables reports whether one of the PG* variables says where to
// connect to.
func postgresVariables() bool {
	return slices.ContainsFunc([]string{"PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"}, func(name string) bool {
		return os.Getenv(name) != ""
	})
}

// connectTimeout is the default: a host that swallows packets takes minutes.
const connectTimeout = 10 * time.Second

func parseDatabaseURL(raw string, allowPlaintext bool) (*pgxpool.Config, error) {
	if err := checkAt(raw); err != nil {
		return nil, mistake("database-url", "%w", err)
	}
	config, err := pgxpool.ParseConfig(raw)
	if err != nil {
		return nil, mistake("database-url", "%w", withoutSecrets(raw, err))
	}
	if strings.Contains(config.ConnConfig.Host, "@") { // of the password, not encoded
		return nil, mistake("database-url", "%w", errMalformed)
	}
	if host, found := plaintextHost(config); found && !allowPlaintext && !namesSSLMode(raw) {
		return nil, mistake("database-url",
			"would fall back to plaintext to %q; say sslmode=verify-full, another sslmode, or --allow-plaintext", host)
	}
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = connectTimeout
	}
	if config.ConnConfig.RuntimeParams["application_name"] == "" {
		config.ConnConfig.RuntimeParams["application_name"] = "txbox relay"
	}
	return config, nil
}

// plaintextHost finds a host beyond this one to which pgx would speak, or fall
// back to, plaintext.
func plaintextHost(config *pgxpool.Config) (host string, found bool) {
	if conn := config.ConnConfig; conn.TLSConfig == nil && !isLocal(conn.Host) {
		return conn.Host, true
	}
	for _, fallback := range config.ConnConfig.Fallbacks {
		if fallback.TLSConfig == nil && !isLocal(fallback.Host) {
			return fallback.Host, true
		}
	}
	return "", false
}

// isLocal is true of loopback and of a Unix socket's folder.
func isLocal(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || strings.HasPrefix(host, "/") || err == nil && addr.IsLoopback()
}

var sslMode = regexp.MustCompile(`(^|[\s?&])sslmode\s*=`)

// namesSSLMode reports whether somebody has decided how safe the connection is.
// Not by url.Parse, which refuses pgx's lists of hosts.
func namesSSLMode(raw string) bool {
	return sslMode.MatchString(raw) || os.Getenv("PGSSLMODE") != ""
}

// withoutSecrets keeps the cause of an error of pgx, if that cannot hold a piece
// of a password: in a URL that does not parse it may be anywhere.
func withoutSecrets(raw string, err error) error {
	u, parseErr := url.Parse(raw)
	if parseErr != nil || raw != "" && u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return errMalformed
	}
	cause := err
	for errors.Unwrap(cause) != nil {
		cause = errors.Unwrap(cause)
	}
	text := cause.Error()
	if cause == err { // it may quote the URL
		return errMalformed
	}
	if query := u.Query(); query.Has("password") || query.Has("sslpassword") {
		return errMalformed // a & or = in it makes a parameter of its rest
	}
	password, _ := u.User.Password()
	for _, secret := range []string{password, os.Getenv("PGPASSWORD"), os.Getenv("PGSSLPASSWORD")} {
		if secret != "" && strings.Contains(text, secret) {
			return errMalformed
		}
	}
	return errors.New(text)
}
