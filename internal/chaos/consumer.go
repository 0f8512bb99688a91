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
	routingKey = "chaos"
	queue      = "chaos.till"
	tapQueue   = "chaos.tap"
)

var errFlaky = errors.New("fails as planned")

const applySQL = "INSERT INTO applied (consumer, message_id, key, seq, hash, at) VALUES ($1, $2, $3, $4, $5, $6)"

func runConsumer(ctx context.Context, db *pgxpool.Pool, o options) error {
	consumer, err := inbox.NewConsumer(db, o.amqpURL, queue, handle, inbox.Config{
		Batch: o.batch, Prefetch: 100, Workers: 3, Timeout: 10 * time.Second, StopTimeout: 10 * time.Second,
		MaxAttempts: 20, // database and broker are away most of the time, but flaky messages fail twice at most
	})
	if err != nil {
		return err
	}
	return consumer.Run(ctx)
}

// handle has one effect for each message.
func handle(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
	b := parse(m.Payload)
	h := hash(m.Payload, m.Type, m.ContentType, m.Headers)
	switch {
	case b.Kind == poison:
		return inbox.Reject(errFlaky)
	case b.Kind == flaky && int64(m.Attempt) <= 1+(h&1):
		return errFlaky
	}
	args := []any{queue, m.ID, b.key(), b.Seq, h, b.At}
	if h&2 == 0 {
		inbox.Pipeline(tx).Queue(applySQL, args...)
		return nil
	}
	_, err := tx.Exec(ctx, applySQL, args...)
	failpoint.Hit("consumer/handler")
	return err
}

// topology declares exchange and queues. The tap is bound last, and unbound first: it must
// not have what the consumers do not get.
func topology(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return err
	}
	for _, q := range []struct {
		name string
		args amqp.Table
	}{
		{queue, amqp.Table{"x-queue-type": "quorum", "x-single-active-consumer": true}},
		{tapQueue, amqp.Table{"x-queue-type": "quorum"}},
	} {
		if _, err := ch.QueueDeclare(q.name, true, false, false, false, q.args); err != nil {
			return err
		}
		if err := ch.QueueBind(q.name, routingKey, exchange, false, nil); err != nil {
			return err
		}
	}
	return nil
}
