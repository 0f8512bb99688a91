package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/dbschema"
)

// Config is what New may be told. The zero value works.
type Config struct {
	// Name is shown to people; default host-pid. Two relays may share one. At most
	// 255 bytes.
	Name string
	// Schema is the database schema of txbox's tables; default "txbox".
	Schema string
	// Lease is how long the lanes of a relay that died stay its own; default 15 s.
	// A relay that cannot renew stops publishing before its lease ends. From 100 ms
	// to 24 h, and not below the publisher's ConfirmTimeout.
	Lease time.Duration
	// RetryFor is how long a message is tried after its first refusal before it is
	// parked as dead; default 7 days, at most 100 years. It must also have failed as
	// often as once a minute in that time, so that an outage, in which nothing is tried,
	// makes nothing dead. Messages for an exchange that is missing or closed to the relay
	// are tried one at a time, every few seconds; those that are not tried do not fail.
	RetryFor time.Duration
	// IdleInterval is the longest wait between two looks at the outbox; default
	// 50 ms, from 1 ms to 1 min.
	IdleInterval time.Duration
	// StopTimeout bounds a clean stop: finishing what is in flight and freeing the
	// lanes; default 20 s, at most 24 h.
	StopTimeout time.Duration
	// Logger gets a line per change of state; default slog.Default().
	Logger *slog.Logger
}

const (
	defaultLease        = 15 * time.Second
	defaultRetryFor     = 7 * 24 * time.Hour
	defaultIdleInterval = 50 * time.Millisecond
	defaultStopTimeout  = 20 * time.Second
	// minTimeout and maxTimeout bound the lease and what must not exceed it.
	minTimeout = 100 * time.Millisecond
	maxTimeout = 24 * time.Hour
	// minConns is how many connections a relay uses at once.
	minConns = 3
)

// withDefaults returns the configuration to run with, or everything that is wrong
// with it.
func (cfg Config) withDefaults(db *pgxpool.Pool, pub Publisher) (Config, error) {
	var problems []error
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if db == nil {
		problem("db is nil")
	} else if n := db.Config().MaxConns; n < minConns {
		problem("db: MaxConns is %d, a relay needs %d", n, minConns)
	}
	if pub == nil {
		problem("pub is nil")
	}
	for _, d := range []struct {
		name  string
		value *time.Duration
		byDef time.Duration
		least time.Duration
		most  time.Duration
	}{
		{"Lease", &cfg.Lease, defaultLease, minTimeout, maxTimeout},
		{"RetryFor", &cfg.RetryFor, defaultRetryFor, 1, 100 * 365 * 24 * time.Hour},
		{"IdleInterval", &cfg.IdleInterval, defaultIdleInterval, time.Millisecond, time.Minute},
		{"StopTimeout", &cfg.StopTimeout, defaultStopTimeout, 1, maxTimeout},
	} {
		if *d.value == 0 {
			*d.value = d.byDef
		}
		if *d.value < d.least || *d.value > d.most {
			problem("%s: %s is not between %s and %s", d.name, *d.value, d.least, d.most)
		}
	}
	if pub != nil && cfg.Lease < pub.rabbitMQ().cfg.ConfirmTimeout {
		problem("Lease: %s is shorter than the publisher's ConfirmTimeout of %s", cfg.Lease, pub.rabbitMQ().cfg.ConfirmTimeout)
	}
	var err error
	if cfg.Schema, err = dbschema.Name(cfg.Schema); err != nil {
		problems = append(problems, err)
	}
	if cfg.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			host = "unknown"
		}
		cfg.Name = fmt.Sprintf("%s-%d", host, os.Getpid())
	}
	if len(cfg.Name) > 255 || !utf8.ValidString(cfg.Name) || strings.ContainsRune(cfg.Name, 0) {
		problem("Name: must be valid UTF-8 of at most 255 bytes, without NUL")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return cfg, errors.Join(problems...)
}
