package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/relay"
)

type runCommand struct {
	databaseFlags
	brokerFlags
	Name         string   `help:"Name shown to people; default host-pid." env:"TXBOX_NAME"`
	Lease        duration `help:"How long the lanes of a relay that died stay its own." default:"15s" env:"TXBOX_LEASE"`
	RetryFor     duration `help:"How long a refused message is tried before it is dead." default:"168h" env:"TXBOX_RETRY_FOR"`
	IdleInterval duration `help:"Longest wait between two looks at the outbox." default:"50ms" env:"TXBOX_IDLE_INTERVAL"`
	StopTimeout  duration `help:"Longest clean stop." default:"20s" env:"TXBOX_STOP_TIMEOUT"`
	LogLevel     string   `help:"debug, info, warn or error." default:"info" env:"TXBOX_LOG_LEVEL"`
	LogFormat    string   `help:"text or json." default:"text" env:"TXBOX_LOG_FORMAT"`
}

// maxConns is more than the 3 that a relay uses at once, so that a connection that
// is being closed holds nobody up.
const maxConns = 4

// Run publishes until ctx ends. Servers may be down: it waits for them.
func (c *runCommand) Run(ctx context.Context, unknown variables) error {
	log, problems := c.logger(os.Stderr)
	problems = append(problems, unknown.problems()...)
	for flag, d := range map[string]duration{
		"lease": c.Lease, "retry-for": c.RetryFor, "idle-interval": c.IdleInterval, "stop-timeout": c.StopTimeout,
		"write-timeout": c.WriteTimeout, "confirm-timeout": c.ConfirmTimeout,
	} {
		if err := d.check(flag); err != nil {
			problems = append(problems, err)
		}
	}
	_, dbConfig, dbProblems := c.databaseFlags.check()
	publisher, brokerProblems := c.publisher()
	problems = append(append(problems, dbProblems...), brokerProblems...)
	if err := c.compare(); err != nil {
		problems = append(problems, err)
	}
	if err := wrongUsage(problems); err != nil {
		return err
	}

	dbConfig.MaxConns = maxConns
	db, err := pgxpool.NewWithConfig(ctx, dbConfig) // connects when it is used
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	defer db.Close()
	r, err := relay.New(db, publisher, relay.Config{
		Name: c.Name, Schema: c.Schema, Lease: c.Lease.Duration, RetryFor: c.RetryFor.Duration,
		IdleInterval: c.IdleInterval.Duration, StopTimeout: c.StopTimeout.Duration, Logger: log,
	})
	if err != nil {
		return wrongUsage([]error{err})
	}
	log.Info("relay runs", "schema", c.Schema)
	if err := r.Run(ctx); err != nil {
		return err
	}
	log.Info("relay has stopped")
	return nil
}

func (c *runCommand) publisher() (relay.Publisher, []error) {
	tlsConfig, problems := c.brokerFlags.tls()
	amqpURL, err := secret("amqp-url", c.AMQPURL, "TXBOX_AMQP_URL", "AMQP_URL")
	if err != nil {
		return nil, append(problems, err)
	}
	publisher, err := relay.RabbitMQ(amqpURL, relay.RabbitMQConfig{
		WriteTimeout: max(0, c.WriteTimeout.Duration), ConfirmTimeout: max(0, c.ConfirmTimeout.Duration),
		TLS: tlsConfig, AllowPlaintext: c.AllowPlaintext.on,
	})
	if err != nil {
		problems = append(problems, fmt.Errorf("--amqp-url: %w", err))
	}
	return publisher, problems
}

// compare checks what New would, for a report of all problems at once.
func (c *runCommand) compare() error {
	if c.Lease.err == nil && c.ConfirmTimeout.err == nil && c.Lease.Duration < c.ConfirmTimeout.Duration {
		return fmt.Errorf("--lease: %s is shorter than --confirm-timeout, %s", c.Lease, c.ConfirmTimeout)
	}
	return nil
}

func (c *runCommand) logger(out io.Writer) (*slog.Logger, []error) {
	var problems []error
	options := &slog.HandlerOptions{}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		problems = append(problems, fmt.Errorf("--log-level: %q is not debug, info, warn or error", c.LogLevel))
	}
	options.Level = level
	switch strings.ToLower(c.LogFormat) {
	case "json":
		return slog.New(slog.NewJSONHandler(out, options)), problems
	case "text":
	default:
		problems = append(problems, fmt.Errorf("--log-format: %q is not text or json", c.LogFormat))
	}
	return slog.New(slog.NewTextHandler(out, options)), problems
}
