package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/failpoint"
)

// tillTables are the consumer's. Nothing keeps an effect from being there twice.
const tillTables = `
CREATE TABLE applied (pos bigint GENERATED ALWAYS AS IDENTITY, consumer text NOT NULL, message_id uuid NOT NULL, key text, seq bigint NOT NULL, hash bigint NOT NULL, at timestamptz NOT NULL);
CREATE INDEX ON applied (at);
`

const (
	exchange   = "chaos"
	fan        = "chaos.fan"
	routingKey = "chaos"
	queue      = "chaos.till"
	otherQueue = "chaos.post" // of another service, which shares the database
	tapQueue   = "chaos.tap"
)

var errFlaky = errors.New("fails as planned")

const applySQL = "INSERT INTO applied (consumer, message_id, key, seq, hash, at) VALUES ($1, $2, $3, $4, $5, $6)"

func runConsumer(ctx context.Context, db *pgxpool.Pool, o options) error {
	consumer, err := inbox.NewConsumer(db, o.amqpURL, o.queue, handler(o.queue), inbox.Config{
		Batch: o.batch, Prefetch: 100, Workers: 3, Timeout: 10 * time.Second, StopTimeout: 10 * time.Second,
		MaxAttempts: 20, // database and broker are away most of the time, but flaky messages fail twice at most
	})
	if err != nil {
		return err
	}
	return consumer.Run(ctx)
}

// handler has one effect for each message.
func handler(consumer string) inbox.Handler {
	return func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		b := parse(m.Payload)
		h := hash(m.Payload, m.Type, m.ContentType, m.Headers)
		fails := int64(m.Attempt) <= 1+(h&1)
		switch {
		case b.Kind == poison:
			return inbox.Reject(errFlaky)
		case b.Kind == flaky && fails:
			return errFlaky
		}
		args := []any{consumer, m.ID, b.key(), b.Seq, h, b.At}
		if h&2 == 0 {
			inbox.Pipeline(tx).Queue(applySQL, args...)
			return nil
		}
		_, err := tx.Exec(ctx, applySQL, args...)
		failpoint.Hit("consumer/handler")
		if b.Kind == sloppy && fails {
			_, _ = tx.Exec(ctx, "SELECT 1/0") // and does not look
		}
		return err
	}
}

// topology declares exchanges and queues. One binding leads to all queues: without it a
// message reaches none of them, not some.
func topology(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclare(fan, amqp.ExchangeFanout, true, false, false, false, nil); err != nil {
		return err
	}
	for name, args := range map[string]amqp.Table{
		queue:      {"x-queue-type": "quorum", "x-single-active-consumer": true},
		otherQueue: nil,
		tapQueue:   {"x-queue-type": "quorum"},
	} {
		if _, err := ch.QueueDeclare(name, true, false, false, false, args); err != nil {
			return err
		}
		if err := ch.QueueBind(name, "", fan, false, nil); err != nil {
			return err
		}
	}
	if err := ch.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return err
	}
	return ch.ExchangeBind(fan, routingKey, exchange, false, nil)
}
