package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/migrations"
	"github.com/txbox/txbox/relay"
)

// place is where one scenario runs: a schema, an exchange and queues of its own.
type place struct {
	db       *pgxpool.Pool
	dbURL    string
	amqpURL  string
	schema   string
	exchange string
	conn     *amqp.Connection
	ch       *amqp.Channel
	queues   []string
	tracer   *counter // of the relay's statements, if set
}

func newPlace(ctx context.Context, dbURL, amqpURL, name string) (*place, error) {
	p := &place{dbURL: dbURL, amqpURL: amqpURL, schema: "bench_" + name, exchange: "bench_" + name}
	var err error
	if p.db, err = pgxpool.New(ctx, dbURL); err != nil {
		return nil, err
	}
	if _, err := p.db.Exec(ctx, "DROP SCHEMA IF EXISTS "+p.schema+" CASCADE"); err != nil {
		return nil, err
	}
	if err := migrations.Up(ctx, dbURL, migrations.Config{Schema: p.schema}); err != nil {
		return nil, err
	}
	if p.conn, err = amqp.Dial(amqpURL); err != nil {
		return nil, err
	}
	if p.ch, err = p.conn.Channel(); err != nil {
		return nil, err
	}
	return p, p.ch.ExchangeDeclare(p.exchange, "topic", true, false, false, false, nil)
}

// queue declares a new quorum queue, bound by its own name.
func (p *place) queue(name string) error {
	name = p.exchange + "_" + name
	if _, err := p.ch.QueueDelete(name, false, false, false); err != nil {
		return err
	}
	if _, err := p.ch.QueueDeclare(name, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return err
	}
	p.queues = append(p.queues, name)
	return p.ch.QueueBind(name, name, p.exchange, false, nil)
}

// fresh empties the outbox and replaces the queue called name, so that no round
// pays for the one before. It returns the routing key.
func (p *place) fresh(ctx context.Context, name string) (string, error) {
	_, err := p.db.Exec(ctx, "TRUNCATE "+p.table("outbox")+", "+p.table("outbox_parked"))
	if err != nil {
		return "", err
	}
	if _, err := p.db.Exec(ctx, "CHECKPOINT"); err != nil {
		return "", err
	}
	return p.exchange + "_" + name, p.queue(name)
}

func (p *place) table(name string) string { return pgx.Identifier{p.schema, name}.Sanitize() }

func (p *place) close(ctx context.Context) {
	for _, queue := range p.queues {
		p.ch.QueueDelete(queue, false, false, false)
	}
	p.ch.ExchangeDelete(p.exchange, false, false)
	p.conn.Close()
	p.db.Exec(ctx, "DROP SCHEMA IF EXISTS "+p.schema+" CASCADE")
	p.db.Close()
}

const (
	payloadBytes = 512
	traceparent  = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
)

// fill writes n messages for routingKey with keys 1 to keys in turn; 0 keys is none.
func (p *place) fill(ctx context.Context, n, keys int, routingKey string) error {
	_, err := p.db.Exec(ctx, `INSERT INTO `+p.table("outbox")+` (message_id, key, exchange, routing_key, type, headers, payload)
		SELECT gen_random_uuid(), CASE WHEN $2::int > 0 THEN 'key-' || (n % greatest($2::int, 1)) END, $3, $4, 'bench',
			jsonb_build_object('traceparent', $5::text), $6::bytea
		FROM generate_series(1, $1::int) AS n`, n, keys, p.exchange, routingKey, traceparent, payload(payloadBytes))
	return err
}

func payload(n int) []byte { return []byte(strings.Repeat("x", n)) }

// running is a relay in this process.
type running struct {
	*relay.Relay
	db   *pgxpool.Pool
	stop context.CancelFunc
	done chan error
}

// relay starts one, with a pool of its own.
func (p *place) relay(ctx context.Context) (*running, error) {
	cfg, err := pgxpool.ParseConfig(p.dbURL)
	if err != nil {
		return nil, err
	}
	if p.tracer != nil {
		cfg.ConnConfig.Tracer = p.tracer
	}
	db, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	pub, err := relay.RabbitMQ(p.amqpURL, relay.RabbitMQConfig{})
	if err != nil {
		return nil, err
	}
	r, err := relay.New(db, pub, relay.Config{Schema: p.schema, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	run := &running{Relay: r, db: db, stop: stop, done: make(chan error, 1)}
	go func() { run.done <- r.Run(ctx) }()
	return run, nil
}

// end stops it and waits.
func (r *running) end() error {
	r.stop()
	err := <-r.done
	r.db.Close()
	return err
}

// until polls; it fails after limit.
func until(ctx context.Context, limit time.Duration, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %s", limit, what)
		}
	}
}

// drained waits until r has published n messages and none of them is in its hand.
func (p *place) drained(ctx context.Context, r *running, n int64) error {
	return until(ctx, 10*time.Minute, fmt.Sprintf("%d messages published", n), func() (bool, error) {
		select {
		case err := <-r.done:
			return false, fmt.Errorf("relay ended: %w", err)
		default:
		}
		s := r.Stats()
		return s.Published >= n && s.InHand == 0, nil
	})
}
