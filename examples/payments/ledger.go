package main

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
)

// No key on order_id: this table stands for the card, which takes any charge.
const chargesTable = `CREATE TABLE charges (id bigint GENERATED ALWAYS AS IDENTITY, order_id uuid NOT NULL, amount bigint NOT NULL)`

// charge charges the card for an order. The ledger and the naive consumer run it.
func charge(ctx context.Context, tx pgx.Tx, order Order) error {
	_, err := tx.Exec(ctx, "INSERT INTO charges (order_id, amount) VALUES ($1, $2)", order.ID, order.Amount)
	return err
}

// runLedger charges once for each message, however often it comes.
func runLedger(ctx context.Context, db *pgxpool.Pool, amqpURL string) error {
	handler := inbox.JSON(func(ctx context.Context, tx pgx.Tx, _ inbox.Message, order Order) error {
		return charge(ctx, tx, order)
	})
	consumer, err := inbox.NewConsumer(db, amqpURL, ledgerQueue, handler, inbox.Config{Setup: topology})
	if err != nil {
		return err
	}
	return consumer.Run(ctx)
}

const (
	exchange    = "txbox-demo"
	ledgerQueue = "txbox-demo.ledger"
	naiveQueue  = "txbox-demo.naive"
	tapQueue    = "txbox-demo.tap" // nobody consumes it: it shows what was on the wire
)

// topology declares what the services need. It is safe to repeat.
func topology(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return err
	}
	for _, queue := range []string{ledgerQueue, naiveQueue, tapQueue} {
		if _, err := ch.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
			return err
		}
		if err := ch.QueueBind(queue, "order.placed", exchange, false, nil); err != nil {
			return err
		}
	}
	return nil
}
