package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// runNaive does what most consumers do: begin, handle, commit, ack. Nothing in it
// looks wrong, and it charges twice for a message that comes twice.
func runNaive(ctx context.Context, db *pgxpool.Pool, amqpURL string) error {
	for ctx.Err() == nil {
		if err := consumeNaively(ctx, db, amqpURL); err != nil {
			slog.Warn("naive consumer reconnects", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

func consumeNaively(ctx context.Context, db *pgxpool.Pool, amqpURL string) error {
	conn, err := amqp.Dial(amqpURL)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := topology(ch); err != nil {
		return err
	}
	if err := ch.Qos(100, 0, false); err != nil {
		return err
	}
	deliveries, err := ch.ConsumeWithContext(ctx, naiveQueue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	for d := range deliveries { // what has been delivered is finished also when ctx ends
		err := pgx.BeginFunc(context.WithoutCancel(ctx), db, func(tx pgx.Tx) error {
			var order Order
			if err := json.Unmarshal(d.Body, &order); err != nil {
				return err
			}
			return charge(context.WithoutCancel(ctx), tx, order)
		})
		if err != nil {
			d.Nack(false, true)
			continue
		}
		if err := d.Ack(false); err != nil {
			return err
		}
	}
	return nil
}
