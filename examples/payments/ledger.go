package main

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/outbox"
)

// No key on order_id: this table stands for the card, which takes any charge.
const chargesTable = `CREATE TABLE charges (id bigint GENERATED ALWAYS AS IDENTITY, order_id uuid NOT NULL, amount bigint NOT NULL)`

// charge charges the card for an order. The ledger and the naive consumer run it.
func charge(ctx context.Context, tx pgx.Tx, order Order) error {
	_, err := tx.Exec(ctx, "INSERT INTO charges (order_id, amount) VALUES ($1, $2)", order.ID, order.Amount)
	return err
}

// runLedger charges once for each message, however often it comes, and tells of it: that
// the message was received, the charge and the next message are one commit.
func runLedger(ctx context.Context, db *pgxpool.Pool, amqpURL string) error {
	handler := inbox.JSON(func(ctx context.Context, tx pgx.Tx, m inbox.Message, order Order) error {
		if err := charge(ctx, tx, order); err != nil {
			return err
		}
		return outbox.Write(ctx, tx, outbox.Message{
			Exchange:   exchange,
			RoutingKey: "payment.made",
			Key:        m.Key,
			Type:       "payment.made",
			Headers:    map[string]string{traceparent: m.Headers[traceparent]},
			Payload:    m.Payload,
		})
	})
	consumer, err := inbox.NewConsumer(db, amqpURL, ledgerQueue, handler, inbox.Config{Setup: topology})
	if err != nil {
		return err
	}
	return consumer.Run(ctx)
}

const (
	exchange      = "txbox-demo"
	ledgerQueue   = "txbox-demo.ledger"
	naiveQueue    = "txbox-demo.naive"
	receiptsQueue = "txbox-demo.receipts"
	tapQueue      = "txbox-demo.tap" // nobody consumes it: it shows what was on the wire

	traceparent = "traceparent" // W3C Trace Context
)

// topology declares what the services need. It is safe to repeat.
func topology(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return err
	}
	for queue, routingKey := range map[string]string{
		ledgerQueue: "order.placed", naiveQueue: "order.placed", tapQueue: "order.placed", receiptsQueue: "payment.made",
	} {
		if _, err := ch.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
			return err
		}
		if err := ch.QueueBind(queue, routingKey, exchange, false, nil); err != nil {
			return err
		}
	}
	return nil
}
